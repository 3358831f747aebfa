# SPDX-License-Identifier: Apache-2.0
"""The compiled module is one of these sources, or it is refused."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from fewbit.core import compiled
from fewbit.errors import UnsupportedError


@pytest.mark.parametrize("numbers", [{}, {"ABI": compiled.ABI + 1}])
def test_a_module_of_other_sources_is_refused(numbers: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(__file__="old/_native.abi3.so", **numbers)
    monkeypatch.setattr(importlib, "import_module", lambda name: other)
    with pytest.raises(UnsupportedError, match=r"old/_native\.abi3\.so.*ABI.*install fewbit again"):
        compiled.load.__wrapped__()


def test_a_module_of_these_sources_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Any = SimpleNamespace(__file__="_native.abi3.so", ABI=compiled.ABI)
    monkeypatch.setattr(importlib, "import_module", lambda name: ours)
    assert compiled.load.__wrapped__() == (ours, None)
