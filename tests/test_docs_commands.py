# SPDX-License-Identifier: Apache-2.0
"""What the pages tell people to type: every command is one that the command line reads, every recipe one that the
recipes' parser does, and Python compiles."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fewbit.cli import app
from fewbit.recipe import Recipe

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
KEYS = ("transforms", "tune", "model", "end")
"""Lines of recipes that pages show by themselves; the first two stand in a rule."""
RULE = '[[rule]]\nmatch = "*"\nformat = "int4/g64"'


def text(page: Path) -> str:
    """Lines that a backslash continues are one."""
    return re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """Code within lines."""
    outside = re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(found.split()) for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", outside)]


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Every command, and whether it is whole: one on a line of its own. Others may leave out what is clear."""
    lines = re.findall(r"^(?: {4})?(?:\$ )?(fewbit [a-z]+\b.*)$", text(page), re.MULTILINE)
    found = [part.strip() for line in lines for part in line.partition("  #")[0].split(";")]
    yield from ((line, True) for line in found if "..." not in line and line.split()[1] in COMMANDS)
    yield from ((span, False) for span in spans(page) if re.match(r"fewbit [a-z]+( |$)", span))


def read(line: str, whole: bool) -> None:
    """By the parser of the command line; what is not ``whole`` may lack arguments, but no option may be made up."""
    name, *words = ({"N": "1"}.get(word, word) for word in shlex.split(line)[1:] if word != "...")
    try:
        COMMANDS[name].make_context(name, words)
    except Exception as error:  # of click, which typer brings along under a name of its own
        if whole or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_read(page: Path) -> None:
    for line, whole in commands(page):
        try:
            read(line, whole)
        except Exception as error:
            pytest.fail(f"{line}: {type(error).__name__} {error}")


def test_a_command_that_is_none_is_seen() -> None:
    read("fewbit quantize MODEL --format int4/g64 -o OUT", True)
    read("fewbit plan --facts FACTS", False)
    for line, whole in (
        ("fewbit quantize MODEL --format int4/g64", True),
        ("fewbit quantize MODEL --fromat int4/g64 -o OUT", True),
        ("fewbit plan --fact FACTS", False),
    ):
        with pytest.raises(Exception, match=r"out|such option"):
            read(line, whole)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_recipes_are_read(page: Path, tmp_path: Path) -> None:
    recipes = [block for block in blocks(page, "toml") if "[[rule]]" in block]
    code = [*spans(page), *re.findall(r"^ {4}(.+)$", text(page), re.MULTILINE)]
    for line in code:
        key = line.partition(" = ")[0]
        if key in KEYS and " = " in line and "..." not in line:
            lines = [RULE, line] if key in KEYS[:2] else [line, RULE]
            recipes.append("\n".join(lines))
    for recipe in recipes:
        (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
        Recipe.read(tmp_path / "recipe.toml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block.replace("(self, ...)", "(self, *_)"), page.name, "exec")
