# SPDX-License-Identifier: Apache-2.0
"""Where results go: nothing that is not fewbit's own is ever replaced, and no two runs work in one place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.containers import manifest as M
from fewbit.errors import InputError, SpecError
from fewbit.run.opening import code_hash, work_in

Short = Callable[..., Any]
Hashes = Callable[[Path], dict[str, str]]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, beside something else of its owner's."""
    shutil.copytree(tiny, tmp_path / "models" / "tiny")
    (tmp_path / "models" / "thesis.tex").write_text("years of work")
    return tmp_path / "models" / "tiny"


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("models/tiny", "it is "),
        ("models/../models/tiny", "it is "),
        ("models", "it holds "),
        ("papers", f"no {M.NAME}"),
        ("link", "it is a link"),
        ("nowhere", "it is a link"),
        ("papers/thesis.tex", "it is a file"),
    ],
)
def test_force_replaces_nothing_but_results(
    model: Path, hashes: Hashes, tmp_path: Path, place: str, found: str
) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    (tmp_path / "made").mkdir()
    (tmp_path / "link").symlink_to("made")
    (tmp_path / "nowhere").symlink_to("absent")
    before = hashes(tmp_path)
    for write in (fewbit.quantize, fewbit.collect):
        more = {"recipe": "int4/g32/asym"} if write is fewbit.quantize else {"samples": 2, "context": 32}
        with pytest.raises(
            InputError, match=found if write is fewbit.quantize else found.replace(M.NAME, "facts.json")
        ):
            write(model, out=tmp_path / place, force=True, **more)
    assert hashes(tmp_path) == before


def test_a_model_that_only_looks_like_a_result_is_not_replaced(model: Path, hashes: Hashes) -> None:
    (model.parent / M.NAME).write_text("{}")
    before = hashes(model.parent)
    with pytest.raises(InputError, match=f"it holds {model}"):
        work_in(model.parent, True, M.NAME, model).__enter__()
    assert hashes(model.parent) == before


@pytest.mark.parametrize("place", [".", "..", ""])
def test_a_place_needs_a_name(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="no folder of its own"):
        short(place, method="rtn", force=True)


def test_empty_folders_and_old_results_are_replaced(short: Short, hashes: Hashes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        short(tmp_path / "out", method="rtn")
    short(tmp_path / "out", method="rtn", force=True)
    old = hashes(tmp_path / "out")
    short(tmp_path / "out", "int8/g32", "rtn", force=True)
    assert hashes(tmp_path / "out") != old


def test_two_runs_do_not_work_in_one_place(short: Short, tmp_path: Path) -> None:
    with work_in(tmp_path / "out", False, M.NAME):
        with pytest.raises(InputError, match="another process is at work"):
            short(tmp_path / "out", method="rtn")
    short(tmp_path / "out", method="rtn")


def test_home_is_the_users(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    short("~/out", method="rtn")
    assert (tmp_path / "out" / M.NAME).is_file()
    with pytest.raises(SpecError, match="~nobody-of-that-name"):
        short("~nobody-of-that-name/out", method="rtn")


def test_the_original_is_found_from_anywhere(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by a relative path, it was looked up where `fewbit eval` ran: there, ``.`` could be the result itself."""
    monkeypatch.chdir(tiny)
    made = fewbit.quantize(".", "int2/g32/asym", out=tmp_path / "out", force=True)
    assert Path(made.manifest["source"]["path"]).samefile(tiny)
    monkeypatch.chdir(tmp_path / "out")
    measured = fewbit.evaluate(".", context=32, max_tokens=64, decode_tokens=0)
    assert measured.kl_mean is not None and measured.kl_mean > 1e-4


def test_the_hash_of_the_code_is_that_of_names_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewbit, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "part").mkdir()
    found = []
    for files in ({"a.py": "xy", "part/b.py": ""}, {"a.py": "x", "part/b.py": "y"}, {"a.py": "xy", "b.py": ""}):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        found.append(code_hash.__wrapped__())
        (tmp_path / "notes.txt").write_text("no code")
        assert code_hash.__wrapped__() == found[-1]
        for name in files:
            (tmp_path / name).unlink()
    assert len(set(found)) == 3
