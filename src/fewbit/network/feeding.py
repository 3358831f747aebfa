# SPDX-License-Identifier: Apache-2.0
"""Batches into a network, and what its layers see of them."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.core.defaults import exact, of_caller
from fewbit.core.facts import Accumulator, Facts
from fewbit.core.observers import Seen
from fewbit.core.rewrite import Chain
from fewbit.errors import InputError, UnsupportedError, first_line, of_layer
from fewbit.kernels.conv import unfold
from fewbit.kernels.window import Window
from fewbit.model.convolution import Margin
from fewbit.model.finite import check_inputs
from fewbit.model.float_weight import FloatWeight
from fewbit.model.hooks import hooked
from fewbit.model.layers import Multiplier
from fewbit.network.functional import AsLayers

Batch = Any
"""A tensor, a tuple of positional arguments, or a mapping of keyword arguments."""

Last = Sequence[tuple[str, int]]
"""By batch: a layer, and after how many of its calls the rest of the network need not run. Empty: it all runs."""

STRIP = 1 << 22
"""Elements of windows that are looked at at a time: 16 MiB of float32."""
SHOWN = 256
"""Inputs of a layer that its error is measured on."""
HANDING_ON = ("fewbit.network.functional", "fewbit.network.inline", "fewbit.model.product")
"""Modules of ours that do no more than what the network asks for itself."""


def batches_of(inputs: Any) -> list[Batch]:
    """``inputs`` as a list.

    Raises:
        InputError: they are one batch, or hold what is none.
    """
    works = "a list of batches, each a tensor, a tuple of arguments or a mapping of keywords: inputs=[images]"
    if isinstance(inputs, (Tensor, Mapping, str)) or not isinstance(inputs, Iterable):
        raise InputError("inputs of a network", f"a {type(inputs).__name__} is no list of batches", works)
    batches = list(inputs)
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Tensor, Mapping, tuple, list)):
            raise InputError("inputs of a network", f"batch {number} is a {type(batch).__name__}", works)
    return batches


@torch.no_grad()
def feed(network: nn.Module, batch: Batch, calls: AsLayers | None = None) -> Any:
    """What ``network`` makes of ``batch``, whose floats are in the dtype of the network's first parameter. ``calls``:
    of it, to be asked afterwards."""
    return call(network, batch, calls)


def call(network: nn.Module, batch: Batch, calls: AsLayers | None = None) -> Any:
    """As :func:`feed`, with gradients.

    Raises:
        InputError: the network cannot be run on ``batch``; it says what torch says. What fails in code of ours, and
            want of memory, is raised as it is.
        UnsupportedError: the network asks a quantized layer for what only the float one has.
    """
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    named = isinstance(batch, Mapping)
    given = () if named else batch if isinstance(batch, (tuple, list)) else (batch,)
    try:
        with of_caller(), (calls or AsLayers(network)).open():
            return network(*map(cast, given), **({key: cast(value) for key, value in batch.items()} if named else {}))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if not _of_network(error):
            raise
        shapes = [str(tuple(x.shape)) for x in (batch.values() if named else given) if isinstance(x, Tensor)]
        what = f"running a {type(network).__name__} on a batch of {', '.join(shapes) or 'no tensor'}"
        works = "batches as its forward takes them: check network(batch)"
        raise InputError(what, first_line(error), works) from error
    except AttributeError as error:
        if isinstance(error.obj, FloatWeight):
            raise error.obj.refusal(f"{error.name!r}") from error
        if not isinstance(error.obj, Multiplier):
            raise
        name = next((name for name, module in network.named_modules() if module is error.obj), "")
        found = f"the network's own code asks that layer for {error.name!r}, which a quantized one does not have"
        raise UnsupportedError(
            f"quantizing {name}", found, f'format "float" in a rule with match = "{name}"'
        ) from error


def _of_network(error: Exception) -> bool:
    """Whether the network itself raised ``error``, which :func:`call` caught: no code of ours was on the way, and
    memory was not what was missing."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # of GPUs, of CPUs
        return False
    assert error.__traceback__ is not None
    frames = traceback.walk_tb(error.__traceback__.tb_next)
    names = {frame.f_globals.get("__name__", "") for frame, _ in frames}.difference(HANDING_ON)
    return not any(name.partition(".")[0] == "fewbit" for name in names)


@dataclass
class Wanted:
    """What to look at in the inputs of a layer, and what was seen.

    ``window``: of a convolution, whose inputs are its windows, (positions, groups, columns), of images with their
    ``margin`` around them. ``facts``, ``gram``: sum
    up E[x], E[x^2] and, with it, E[x x^T]. ``range``: nothing but the numbers that leave ``rewrite``. Without either,
    the first inputs are shown.
    """

    columns: int
    window: Window | None
    gram: bool
    facts: bool
    range: bool
    margin: Margin | None = None
    accumulator: Accumulator = field(init=False)
    total: Tensor = field(init=False)
    tokens: int = 0
    rewrite: Chain = field(default_factory=Chain)
    seen: Seen = field(default_factory=Seen.none)
    shown: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accumulator = Accumulator(self.columns, self.gram)
        self.total = torch.zeros(1 if self.window is None else self.window.groups, self.columns, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """E[x], (groups, columns) float64; zero when nothing was seen."""
        return self.total / max(1, self.tokens)

    def inputs(self) -> tuple[Facts, Tensor]:
        """Facts of all groups' inputs together, and (tokens, columns) of those shown, none where groups differ."""
        whole = self.window is None or self.window.groups == 1
        return self.accumulator.facts(), torch.cat(self.shown) if self.shown and whole else torch.zeros(0, self.columns)

    def takes(self, x: Tensor) -> bool:
        """Whether x has the shape of the layer's inputs; a range is of any."""
        if self.range:
            return True
        if self.window is None:
            return x.dim() > 0 and x.shape[-1] == self.columns
        channels = self.total.numel() // math.prod(self.window.size)
        if x.shape[1] != channels or (self.margin is not None and not self.margin.fits(x)):
            return False
        return min(self.window.out(self._whole(x))) > 0

    def _whole(self, x: Tensor) -> Tensor:
        return x if self.margin is None else self.margin.around(x)

    def look(self, x: Tensor) -> None:
        """At one batch's inputs, as the module gets them."""
        if self.range:
            self.seen = self.seen.merge(Seen.of(self.rewrite.apply(x)))
            return
        left = SHOWN - sum(len(part) for part in self.shown)
        for tokens in self._tokens(x):
            if left > 0:
                self.shown.append(tokens[:left, 0].clone())
                left -= len(self.shown[-1])
            if not self.facts:
                return
            self.total += tokens.sum(0, dtype=torch.float64)
            self.tokens += len(tokens)
            self.accumulator.add(tokens)

    def _tokens(self, x: Tensor) -> Iterable[Tensor]:
        """Float32 (tokens, groups, columns), some at a time."""
        x = x.detach().float()
        if self.window is None:
            yield x.reshape(-1, 1, self.columns)
            return
        x = self._whole(x)
        high, wide = self.window.out(x)
        width = self.total.numel()
        positions, step = x.shape[0] * high * wide, max(1, STRIP // width)
        for begin in range(0, positions, step):
            end = min(begin + step, positions)
            out = torch.empty(end - begin, width, dtype=torch.float32)  # the core writes there
            unfold(x, self.window, begin, end, out)
            yield out.reshape(end - begin, -1, self.columns)


class _Enough(Exception):
    """Raised inside a network once all was seen: what it would still compute, nobody needs."""


def look(network: nn.Module, batches: Iterable[Batch], wanted: Mapping[str, Wanted], last: Last = ()) -> None:
    """Run ``network`` on ``batches`` and look at the inputs of the layers named, each batch until its ``last``.

    Raises:
        InputError: a layer's inputs hold NaN or infinity; the message names the first that has them.
    """
    left = Counter[str]()

    def seen(name: str, x: Tensor) -> None:
        check_inputs(x, name)
        if wanted[name].window is not None and x.dim() != 4:
            found = f"they are of shape {tuple(x.shape)}"
            raise InputError(f"inputs of {name}", found, "(images, channels, height, width), one image is a batch of 1")
        if not wanted[name].takes(x):
            return  # the layer itself says what it minds
        with of_layer(name):
            wanted[name].look(x)
        left[name] -= 1
        if left[name] == 0:
            raise _Enough

    with _reporting(network, wanted, seen):
        for index, batch in enumerate(batches):
            left = Counter(dict(last[index : index + 1]))
            with suppress(_Enough):
                feed(network, batch)


def calls(network: nn.Module, batch: Batch, names: Iterable[str]) -> Counter[str]:
    """How often each of the layers ``names`` runs on ``batch``, in the order in which they begin."""
    count = Counter[str]()

    def seen(name: str, x: Tensor) -> None:
        count[name] += 1

    with _reporting(network, names, seen):
        feed(network, batch)
    return count


@contextmanager
def _reporting(network: nn.Module, names: Iterable[str], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, every layer of ``names`` calls ``seen`` with its inputs."""

    def hook(name: str) -> Any:
        return exact()(lambda module, args, kwargs: seen(name, args[0] if args else kwargs["input"]))

    with hooked(network.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names):
        yield
