# SPDX-License-Identifier: Apache-2.0
"""In which order the layers of a block see their inputs, and what of the block need not run again once they are solved.

Layers that share an input are a group; groups come in the order in which the block asks for them. Once a group is
quantized, its outputs are what all later groups see. To give every group the inputs that the quantized ones before it
make, without running those again for each, a submodule whose output is the output of the last layer in it (attention
ends in its output projection, an MLP in its down projection) is closed when that layer is solved: from then on the
stored output stands for the submodule.

All of this is found by watching one small sample pass through the block, not by names; see :mod:`fewbit.model.replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.model.hooks import hooked
from fewbit.model.loading import under
from fewbit.model.sites import Site, in_block
from fewbit.model.stream import Inputs, StreamedModel


@dataclass(frozen=True)
class Form:
    """How a module takes or gives (batch, tokens, ``width``): ``flat`` as (batch * tokens, width); in ``dtype``."""

    width: int
    flat: bool
    dtype: torch.dtype

    def shaped(self, x: Tensor) -> Tensor:
        """``x`` (batch, tokens, width) as the module has it."""
        return (x.reshape(-1, self.width) if self.flat else x).to(self.dtype)

    def stored(self, x: Tensor, hidden: Tensor) -> Tensor:
        """What the module has, as (batch, tokens, width); ``hidden`` has the same first two axes."""
        return x.reshape(*hidden.shape[:2], self.width)


@dataclass(frozen=True)
class Closing:
    """After group ``group`` is solved, ``module`` (a path) gives what ``site`` makes of its inputs.

    ``inputs``, ``outputs``: their forms. ``entries``: the module returns a tuple of so many, the output first and
    nothing that the block uses behind it; 0 when it returns the output alone.
    """

    group: int
    site: str
    module: str
    inputs: Form
    outputs: Form
    entries: int


@dataclass(frozen=True)
class Order:
    """``groups`` of sites in order; ``closings`` by group. Every site multiplies each token exactly once.

    ``feeders``: modules without sites (norms) and the modules that take their output; once all of those are closed,
    nobody needs it. ``givers``: of each group the feeder whose output its layers see, or "".
    """

    groups: tuple[tuple[str, ...], ...]
    closings: tuple[Closing, ...]
    feeders: tuple[tuple[str, tuple[str, ...]], ...] = ()
    givers: tuple[str, ...] = ()

    def closed(self, group: int) -> list[Closing]:
        """What is closed while the inputs of ``group`` are made, the outermost of nested ones."""
        known = [closing for closing in self.closings if closing.group < group]
        return [one for one in known if not any(other is not one and inside(one, other) for other in known)]

    def same_output(self, group: int) -> str | None:
        """A module around the only layer of ``group`` whose output is that of this layer."""
        for one in self.closings:
            if self.groups[group] == (one.site,) and one.group == group and one.module != one.site:
                return one.module
        return None

    def giver(self, group: int) -> str:
        """The module that makes anew, for the inputs of ``group``, what the group before it has seen; or ""."""
        module = self.givers[group - 1] if 0 < group <= len(self.givers) else ""
        return "" if _covered(module, self.closed(group)) or module in self.idle(group) else module

    def idle(self, group: int) -> list[str]:
        """Modules whose output nobody needs while the inputs of ``group`` are made."""
        closed = self.closed(group)
        return [
            module
            for module, takers in self.feeders
            if all(_covered(taker, closed) for taker in takers) and not _covered(module, closed)
        ]


def inside(one: Closing, other: Closing) -> bool:
    """Whether ``one`` is needed no more when ``other`` is closed."""
    return under(one.module, other.module)


@dataclass
class _Watch:
    """What one run of a block showed. Tensors are kept, so that an object's identity and address stay its own."""

    calls: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, list[Tensor]] = field(default_factory=dict)
    odd: str = ""


def find_order(
    model: StreamedModel, index: int, hidden: Tensor, inputs: Inputs
) -> tuple[Order | str, dict[str, Tensor]]:
    """The order of block ``index``, or the reason why it has none, and what the sample showed: every site's input and,
    as "", the block's output.

    ``hidden`` (batch, tokens, width) is the sample and ``inputs`` what the block is called with beside it.
    """
    sites = list(in_block(model.sites, index))
    if routed := [site.name for site in sites if site.kind == "experts"]:
        return f"{routed[0]} sees only the tokens that are routed to it", {}
    name = model.blocks[index]
    watch = _Watch()
    block = model.module.get_submodule(name)
    entering = (
        block.get_submodule(site.name[len(name) + 1 :]).register_forward_pre_hook(
            _entering(site, watch), with_kwargs=True
        )
        for site in sites
    )
    leaving = (
        module.register_forward_hook(_leaving(f"{name}.{path}", watch), with_kwargs=True)
        for path, module in _below(block)
    )
    with hooked(entering), hooked(leaving):
        result = model.run_block(index, hidden, inputs)
    if len(watch.calls) != len(sites):
        missing = [site.name for site in sites if site.name not in watch.inputs]
        return watch.odd or f"{missing[0]} is not called as a module", {}
    if watch.odd:
        return watch.odd, {}
    return _plan(watch, _groups(watch), hidden), {**watch.inputs, "": result}


def _below(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in block.named_modules() if path]


def _entering(site: Site, watch: _Watch) -> Callable[..., None]:
    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if site.name in watch.inputs:
            watch.odd = watch.odd or f"{site.name} is called more than once"
        if len(arguments) != 1 or named or not isinstance(arguments[0], Tensor):
            watch.odd = watch.odd or f"{site.name} is called with more than its inputs"
            return
        watch.calls.append(site.name)
        watch.inputs[site.name], watch.versions[site.name] = arguments[0], arguments[0]._version

    return note


def _leaving(path: str, watch: _Watch) -> Callable[..., None]:
    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        watch.outputs[path] = output
        watch.taken[path] = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]

    return note


def _groups(watch: _Watch) -> tuple[tuple[str, ...], ...]:
    """Sites that were called with the same values in the same memory, in the order of the first call."""
    groups: dict[Any, list[str]] = {}
    for name in watch.calls:
        x = watch.inputs[name]
        groups.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype, watch.versions[name]), []).append(name)
    return tuple(tuple(group) for group in groups.values())


def _plan(watch: _Watch, groups: tuple[tuple[str, ...], ...], hidden: Tensor) -> Order | str:
    """Walk through the passes that the groups take; what ran in one must be closed before the next."""
    order = Order(groups, ())
    ran: set[str] = set()
    for number in range(len(groups) + 1):
        until = watch.calls.index(groups[number][0]) if number < len(groups) else len(watch.calls)
        closed = order.closed(number)
        ran |= {name for name in watch.calls[:until] if not _covered(name, closed)}
        if number == len(groups) or all(_covered(name, closed) for name in ran):
            continue
        for site in groups[number]:
            closing = _closing(watch, number, site, groups, hidden)
            if closing is not None and all(_covered(name, [*closed, closing]) for name in ran):
                order = Order(groups, (*order.closings, closing))
                ran.add(site)
                break
        else:
            uncovered = next(name for name in watch.calls if name in ran and not _covered(name, closed))
            return f"{uncovered} would have to run again for the layers after {groups[number][-1]}"
    feeders = tuple(_feeders(watch))
    return replace(order, feeders=feeders, givers=tuple(_giver(watch, group[0], feeders) for group in groups))


def _giver(watch: _Watch, site: str, feeders: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """Which of ``feeders`` the inputs of ``site`` are the output of; "" for none."""
    return next((path for path, _ in feeders if watch.outputs[path] is watch.inputs[site]), "")


def _feeders(watch: _Watch) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules without sites whose output, shaped as their first input, other modules take."""
    for path, output in watch.outputs.items():
        if any(under(name, path) or under(path, name) for name in watch.calls) or not watch.taken[path]:
            continue
        takers = [
            other
            for other, taken in watch.taken.items()
            if any(value is output for value in taken) and not under(other, path) and not under(path, other)
        ]
        if isinstance(output, Tensor) and output.shape == watch.taken[path][0].shape and takers:
            yield path, tuple(takers)


def _covered(name: str, closed: Sequence[Closing]) -> bool:
    return any(under(name, closing.module) for closing in closed)


def _closing(
    watch: _Watch, number: int, site: str, groups: tuple[tuple[str, ...], ...], hidden: Tensor
) -> Closing | None:
    """The outermost module whose output is that of ``site``, where all sites in it are solved with group ``number``."""
    solved = {name for group in groups[: number + 1] for name in group}
    result = _first(watch.outputs[site])
    for path in sorted(watch.outputs, key=len):
        output = watch.outputs[path]
        within = {name for name in watch.calls if under(name, path)}
        if not under(site, path) or _first(output) is not result or not within <= solved:
            continue
        taken, given = _form(watch.inputs[site], hidden), _form(result, hidden)
        if taken is None or given is None:
            return None
        return Closing(number, site, path, taken, given, len(output) if isinstance(output, tuple) else 0)
    return None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _form(x: Any, hidden: Tensor) -> Form | None:
    """How ``x`` lies, for a sample of shape ``hidden`` (batch, tokens, width)."""
    batch, tokens, _ = hidden.shape
    if isinstance(x, Tensor) and x.shape[:-1] in ((batch, tokens), (batch * tokens,)):
        return Form(x.shape[-1], x.ndim == 2, x.dtype)
    return None
