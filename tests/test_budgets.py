# SPDX-License-Identifier: Apache-2.0
"""The size budgets: files, functions, folders. Literal tables and generated files would be exempt; none is today."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fewbit"
FILE_LINES, FUNCTION_LINES, FOLDERS = 400, 60, 3
PYTHON = sorted(path for folder in ("src", "tests", "bench", "docs") for path in (ROOT / folder).rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cc", ".h", ".c", ".hpp", ".cpp"})


def long_functions(source: str) -> list[tuple[str, int]]:
    """Functions of more than 60 lines, decorators not counted."""
    return [
        (node.name, length)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    ]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_measure() -> None:
    assert len([path for path in PYTHON if SOURCE in path.parents]) > 20


@pytest.mark.parametrize("path", PYTHON + NATIVE, ids=name)
def test_file_length(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_function_length(path: Path) -> None:
    assert long_functions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [path for path in PYTHON if SOURCE in path.parents], ids=name)
def test_folder_depth(path: Path) -> None:
    assert len(path.relative_to(SOURCE).parts) - 1 <= FOLDERS


@pytest.mark.parametrize("path", PYTHON + NATIVE, ids=name)
def test_licence_line(path: Path) -> None:
    head = path.read_text(encoding="utf-8")[:200]
    assert "SPDX-License-Identifier: Apache-2.0" in head


def test_a_long_function_is_seen() -> None:
    body = "\n".join(f"    x = {i}" for i in range(FUNCTION_LINES))
    assert long_functions(f"def long():\n{body}\n") == [("long", FUNCTION_LINES + 1)]
    assert long_functions(f"def short():\n{body}\n".replace("    x = 0\n", "")) == []
