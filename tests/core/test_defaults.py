# SPDX-License-Identifier: Apache-2.0
"""Defaults of torch set aside, and put back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from fewbit.core.defaults import exact, of_caller

Unusual = Callable[[], AbstractContextManager[None]]
Seen = tuple[torch.dtype, torch.device, bool]


def seen() -> Seen:
    """Dtype and device of a new tensor, and whether products are rounded."""
    made = torch.zeros(1)
    return made.dtype, made.device, torch.is_autocast_enabled("cpu")


PLAIN: Seen = (torch.float32, torch.device("cpu"), False)


def test_they_are_set_aside_and_put_back(unusual: Unusual) -> None:
    with unusual():
        before = seen()
        assert before != PLAIN
        with exact():
            assert seen() == PLAIN
            with of_caller():
                assert seen() == (*before[:2], False)
                with exact():  # a hook of ours inside of a network of the user's
                    assert seen() == PLAIN
                assert seen() == (*before[:2], False)
            assert seen() == PLAIN
        assert seen() == before
        with of_caller():  # nothing is open
            assert seen() == before


def test_they_are_put_back_after_an_error(unusual: Unusual) -> None:
    @exact()
    def fails() -> None:
        assert seen() == PLAIN
        with of_caller():
            raise ValueError("of the user's network")

    with unusual():
        before = seen()
        for _ in range(2):
            with pytest.raises(ValueError, match="of the user's"):
                fails()
            assert seen() == before
    assert seen() == PLAIN


def test_a_device_that_a_with_statement_sets_is_set_aside_too() -> None:
    with torch.device("meta"):
        with exact():
            assert seen() == PLAIN
            with of_caller():
                assert seen()[1].type == "meta"
        assert seen()[1].type == "meta"
