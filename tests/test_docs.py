# SPDX-License-Identifier: Apache-2.0
"""The generated pages are up to date, links lead somewhere, and the README keeps its promises about itself."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    assert generator().stale() == [], "run python docs/generate.py"


def test_every_method_has_a_page() -> None:
    from fewbit.methods import METHODS

    for method in METHODS:
        page = (ROOT / "docs" / "methods" / f"{method.name}.md").read_text(encoding="utf-8")
        for option in method.options:
            assert f"`{option}`" in page, f"{method.name}.md does not explain {option}"


def test_what_a_model_learns_has_a_page() -> None:
    from fewbit.methods import MODEL_TUNINGS

    page = (ROOT / "docs" / "methods" / "distill.md").read_text(encoding="utf-8")
    for row in MODEL_TUNINGS:
        for word in (row.name, *row.options):
            assert f"`{word}`" in page, f"distill.md does not explain {word}"


def test_every_transform_has_a_page() -> None:
    from fewbit.transforms import MODEL_TRANSFORMS, TRANSFORMS

    for transform in (*TRANSFORMS, *MODEL_TRANSFORMS):
        page = (ROOT / "docs" / "transforms" / f"{transform.name}.md").read_text(encoding="utf-8")
        for option in transform.options:
            assert f"`{option}`" in page, f"{transform.name}.md does not explain {option}"


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page: lower case, words joined by hyphens, repeated ones numbered."""
    headings = re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]
    return {f"{name}-{again}" if (again := names[:i].count(name)) else name for i, name in enumerate(names)}


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != ROOT], ids=lambda page: page.name)
def test_pages_are_short(page: Path) -> None:
    """At most 400 lines, and 160 words a paragraph: what grows beyond is a page, a list or a table of its own."""
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 400
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[-*|] ?)", prose(page))
    assert [text[:60] for text in paragraphs if not text.startswith("|") and len(text.split()) > 160] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached() -> None:
    """From the README, link by link."""
    seen: set[Path] = set()
    left = [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", prose(page))
        left += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert sorted(set(PAGES) - seen) == []


def test_readme_opens_with_sentence_install_and_six_lines() -> None:
    head = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    assert "pip install" in head
    code = head.partition("```python\n")[2].partition("\n```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) == 6
    compile(code, "README.md", "exec")


def test_ci_finds_the_readme_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for mark in ("demo", "tests"):
        command = re.search(rf"<!-- ci: {mark} -->\n```\n(.+?)\n```", text, re.DOTALL)
        assert command is not None
        assert len(command[1].splitlines()) == 1


def test_extras_exist() -> None:
    """What `fewbit doctor` tells people to install is in pyproject.toml."""
    from fewbit.doctor import EXTRAS

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in EXTRAS:
        assert f"fewbit[{extra.name}]" in extra.install
        assert re.search(rf"^{extra.name} = \[", project, re.MULTILINE), extra.name
