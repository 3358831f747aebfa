# SPDX-License-Identifier: Apache-2.0
"""Hooks that modules have for a while, and not a moment longer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fewbit.model.hooks import hooked


def test_hooks_are_there_while_open_and_gone_after_errors() -> None:
    one, two, seen = nn.Linear(2, 2), nn.Linear(2, 2), []

    def handles(last: bool) -> Iterator[RemovableHandle]:
        yield one.register_forward_hook(lambda *_: seen.append("one"))
        if last:
            raise KeyError("no such module")
        yield two.register_forward_pre_hook(lambda *_: seen.append("two"))

    with hooked(handles(False)):
        two(one(torch.zeros(2)))
    assert seen == ["one", "two"]
    with pytest.raises(ValueError, match="inside"), hooked(handles(False)):
        raise ValueError("inside")
    with pytest.raises(KeyError), hooked(handles(True)):
        raise AssertionError("never reached")
    two(one(torch.zeros(2)))
    assert seen == ["one", "two"] and not one._forward_hooks and not two._forward_pre_hooks
