# SPDX-License-Identifier: Apache-2.0
"""Activations of the quantized path, rounded as the quantized layers will round them when the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fewbit import formats
from fewbit.core.format import Format
from fewbit.kernels.reference import round_activations
from fewbit.model.stream import StreamedModel
from fewbit.run.planning import Plan


@contextmanager
def rounded(model: StreamedModel, plan: Plan, index: int) -> Iterator[None]:
    """While open, layers of block ``index`` whose rule names an activation format see their inputs in it."""
    handles = [
        model.module.get_submodule(decision.site.name).register_forward_pre_hook(
            _rounding(formats.parse(decision.rule.activation))
        )
        for decision in plan.decisions
        if decision.site.block == index and decision.rule is not None and decision.rule.activation is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding(format: Format) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_activations(arguments[0], format), *arguments[1:])

    return hook
