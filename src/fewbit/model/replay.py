# SPDX-License-Identifier: Apache-2.0
"""A block run group by group, with stored outputs in place of what was closed; see :mod:`fewbit.model.order`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.model.hooks import hooked
from fewbit.model.loading import under
from fewbit.model.order import Closing, Order, find_order
from fewbit.model.sites import in_block
from fewbit.model.stream import Inputs, StreamedModel, with_replaced

Step = Callable[[Tensor, Inputs, Mapping[str, Tensor]], Tensor]
"""``step(hidden, inputs, outputs)``: ``outputs`` are the closed modules' by path, as :func:`output` gives them; and by
that of :meth:`Order.giver`, where it need not run again, the very inputs of the group before."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a module."""


class Reached(Exception):
    """Raised inside a block at the layer whose inputs were wanted."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class _Stored(nn.Module):
    """Stands for a closed module: gives the stored output of the batch that this thread is at."""

    def __init__(self, local: threading.local, closing: Closing) -> None:
        super().__init__()
        self._local, self._closing = local, closing

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = self._closing.outputs.shaped(self._local.outputs[self._closing.module])
        return (output, *[None] * (self._closing.entries - 1)) if self._closing.entries else output


class _Idle(nn.Module):
    """Stands for a module whose output nobody needs."""

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return x


class _Giving(nn.Module):
    """Stands for a module that gives what the group before has seen: that, where this thread has it at hand."""

    def __init__(self, local: threading.local, path: str, module: nn.Module) -> None:
        super().__init__()
        self._local, self._path, self._module = local, path, module

    def forward(self, *arguments: Any, **named: Any) -> Any:
        seen = self._local.outputs.get(self._path)
        return self._module(*arguments, **named) if seen is None else seen


@contextmanager
def replaying(model: StreamedModel, index: int, order: Order, group: int) -> Iterator[Step]:
    """A function that runs block ``index`` up to the inputs of ``group``, which it returns as the layer would get them;
    for the number past the last group, to the block's end, (batch, tokens, width). Threads may share it.
    """
    name, local = model.blocks[index], threading.local()
    stored: dict[str, nn.Module] = {
        closing.module[len(name) + 1 :]: _Stored(local, closing) for closing in order.closed(group)
    }
    stored |= {module[len(name) + 1 :]: _Idle() for module in order.idle(group)}
    if giver := order.giver(group):
        stored[giver[len(name) + 1 :]] = _Giving(local, giver, model.module.get_submodule(giver))
    twin = with_replaced(model.module.get_submodule(name), stored)

    def step(hidden: Tensor, inputs: Inputs, outputs: Mapping[str, Tensor]) -> Tensor:
        arguments, named = inputs.calls[index]
        local.outputs = outputs
        try:
            out = twin(hidden, *arguments, **named)
        except Reached as reached:
            return reached.x
        finally:
            local.outputs = {}
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    firsts = [model.module.get_submodule(names[0]) for names in order.groups[group : group + 1]]
    with hooked(first.register_forward_pre_hook(_reached) for first in firsts):
        yield step


@contextmanager
def calls_around(
    model: StreamedModel, index: int, order: Order, group: int
) -> Iterator[Callable[[Tensor, Inputs, Mapping[str, Tensor]], tuple[str, Call]]]:
    """As :func:`replaying`, for the smallest module that is called and holds all of ``group``: its path, and its call.
    The block itself where no module in it does. For one thread."""
    name = model.blocks[index]
    noted: dict[str, Call] = {}
    hooks = (
        model.module.get_submodule(path).register_forward_pre_hook(partial(_note, noted, path), with_kwargs=True)
        for path in _holding(name, order.groups[group])
    )
    with hooked(hooks), replaying(model, index, order, group) as step:

        def called(hidden: Tensor, inputs: Inputs, outputs: Mapping[str, Tensor]) -> tuple[str, Call]:
            noted.clear()
            step(hidden, inputs, outputs)
            return max(noted.items(), key=lambda item: len(item[0]))

        yield called


@dataclass(frozen=True)
class Shared:
    """Layers of a block that share an input: their ``names``, and the smallest module around them that is called, a
    path; ``same``: the only layer's output is that of this module, the largest such."""

    names: tuple[str, ...]
    module: str
    same: bool


def shared_inputs(model: StreamedModel, index: int, hidden: Tensor, inputs: Inputs) -> list[Shared]:
    """Of block ``index``, as a sample ``hidden`` (batch, tokens, width) shows; of one that need have no order. Without
    fused experts, and layers that the sample does not reach, or more than once."""
    name, taken, made = model.blocks[index], dict[str, list[Any]](), dict[str, Any]()
    sites = [site.name for site in in_block(model.sites, index) if site.kind != "experts"]

    def enter(path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        taken.setdefault(path, []).append(arguments[0] if arguments else None)

    def leave(path: str, module: nn.Module, arguments: tuple[Any, ...], out: Any) -> None:
        made[path] = out[0] if isinstance(out, tuple) and out else out

    module, called = model.module.get_submodule, [*sites, *(path for site in sites for path in _holding(name, [site]))]
    entering = (module(path).register_forward_pre_hook(partial(enter, path)) for path in sites)
    leaving = (module(path).register_forward_hook(partial(leave, path)) for path in dict.fromkeys(called))
    with hooked(entering), hooked(leaving):
        model.run_block(index, hidden, inputs)
    groups: dict[Any, list[str]] = {}
    for path, seen in taken.items():
        if len(seen) == 1 and isinstance(x := seen[0], Tensor):
            groups.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype), []).append(path)
    found = []
    for names in groups.values():
        around = [path for path in _holding(name, names) if path in made]
        same = [path for path in around if made[path] is made[names[0]]] if len(names) == 1 else []
        found.append(Shared(tuple(names), same[0] if same else around[-1], bool(same)))
    return found


@contextmanager
def noting_calls(model: StreamedModel, paths: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
    """While open, what each of the modules ``paths`` is called with, copied. For one thread."""
    noted: dict[str, list[Call]] = {path: [] for path in paths}

    def note(path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        noted[path].append((tuple(map(_copied, arguments)), {key: _copied(value) for key, value in named.items()}))

    with hooked(
        model.module.get_submodule(path).register_forward_pre_hook(partial(note, path), with_kwargs=True)
        for path in noted
    ):
        yield noted


def _copied(value: Any) -> Any:
    """Blocks may add to what they have called a module with."""
    return value.clone() if isinstance(value, Tensor) else value


def _holding(block: str, names: Sequence[str]) -> list[str]:
    """Paths of ``block`` and of what in it holds all of ``names``."""
    parts = names[0].split(".")
    paths = [".".join(parts[:count]) for count in range(block.count(".") + 1, len(parts))]
    return [path for path in paths if all(under(name, path) for name in names)]


def _note(
    noted: dict[str, Call], path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    noted[path] = (arguments, named)


def _reached(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    raise Reached(arguments[0])


def output(model: StreamedModel, closing: Closing, x: Tensor) -> Tensor:
    """What the closed module gives for inputs ``x`` of its last layer: both (batch, tokens, width), as files keep
    them."""
    made: Tensor = model.module.get_submodule(closing.site)(closing.inputs.shaped(x))
    return made.reshape(*x.shape[:2], -1)


def checked_order(model: StreamedModel, index: int, hidden: Tensor, inputs: Inputs) -> Order | str:
    """The order of block ``index`` once a replay of the sample ``hidden`` (batch, tokens, width) gave every layer the
    very inputs of a direct run, bit for bit, and the same end; or the reason why the block has to run as a whole."""
    order, direct = find_order(model, index, hidden, inputs)
    if isinstance(order, str):
        return order
    reason = _difference(model, index, order, hidden, inputs, direct)
    if reason and order.feeders:  # something beside other modules may have used what they gave
        order = replace(order, feeders=(), givers=())
        reason = _difference(model, index, order, hidden, inputs, direct)
    return reason or order


def _difference(
    model: StreamedModel, index: int, order: Order, hidden: Tensor, inputs: Inputs, direct: Mapping[str, Tensor]
) -> str:
    """In what a replay of the sample differs from its direct run; empty when in nothing."""
    outputs: dict[str, Tensor] = {}
    for group in range(len(order.groups) + 1):
        for closing in order.closings:
            if closing.group == group - 1:
                kept = closing.inputs.stored(direct[closing.site], hidden)
                outputs[closing.module] = output(model, closing, kept)
        if giver := order.giver(group):
            outputs[giver] = direct[order.groups[group - 1][0]].clone()
        at = order.groups[group][0] if group < len(order.groups) else ""
        try:
            with replaying(model, index, order, group) as step:
                again = step(hidden, inputs, outputs)
        except (AttributeError, TypeError) as error:
            return f"it does not run with stored outputs ({error})"
        if not _same(again, direct[at]):
            return f"a replay changes {f'the inputs of {at}' if at else 'its output'}"
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
