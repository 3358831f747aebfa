# SPDX-License-Identifier: Apache-2.0
"""Activations of the quantized path, rewritten and rounded as the quantized layers will do it when the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fewbit.core.format import Format
from fewbit.core.rewrite import Chain
from fewbit.formats.fixed import Fixed
from fewbit.kernels import Rewriting
from fewbit.kernels.reference import round_activations
from fewbit.model.stream import StreamedModel
from fewbit.run.solve import Solved


@contextmanager
def as_run(model: StreamedModel, solved: Iterable[Solved]) -> Iterator[None]:
    """While open, layers that hold the decoded weights of ``solved`` see their inputs rewritten, then rounded, unless
    their grid is yet to be fixed."""
    handles = [
        model.module.get_submodule(item.record["name"]).register_forward_pre_hook(
            _inputs(item.rewrite, item.activation)
        )
        for item in solved
        if item.activation is not None or item.rewrite.steps
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(rewrite: Chain, activation: Format | None) -> Any:
    if isinstance(activation, Fixed) and not activation.bound:
        activation = None  # calibration is about to look at what is then rounded
    rewriting = Rewriting(rewrite)

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_activations(rewriting(arguments[0]), activation), *arguments[1:])

    return hook
