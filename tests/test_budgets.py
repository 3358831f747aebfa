# SPDX-License-Identifier: Apache-2.0
"""The size budgets: files, functions, folders. Literal tables and generated files would be exempt; none is today."""

from __future__ import annotations

import ast
from pathlib import Path

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


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_there_is_something_to_measure() -> None:
    assert len([path for path in PYTHON if SOURCE in path.parents]) > 20
    assert len(NATIVE) > 5


def test_files_are_short() -> None:
    lengths = {name(path): len(text(path).splitlines()) for path in PYTHON + NATIVE}
    assert {path: length for path, length in lengths.items() if length > FILE_LINES} == {}


def test_functions_are_short() -> None:
    found = {name(path): long_functions(text(path)) for path in PYTHON}
    assert {path: functions for path, functions in found.items() if functions} == {}


def test_folders_are_shallow() -> None:
    depths = {name(path): len(path.relative_to(SOURCE).parts) - 1 for path in PYTHON if SOURCE in path.parents}
    assert {path: depth for path, depth in depths.items() if depth > FOLDERS} == {}


def test_every_file_names_its_licence() -> None:
    assert [
        name(path) for path in PYTHON + NATIVE if "SPDX-License-Identifier: Apache-2.0" not in text(path)[:200]
    ] == []


def test_a_long_function_is_seen() -> None:
    body = "\n".join(f"    x = {i}" for i in range(FUNCTION_LINES))
    assert long_functions(f"def long():\n{body}\n") == [("long", FUNCTION_LINES + 1)]
    assert long_functions(f"def short():\n{body}\n".replace("    x = 0\n", "")) == []
