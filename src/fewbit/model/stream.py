# SPDX-License-Identifier: Apache-2.0
"""A model that is never in memory as a whole: open, load a module, run a block, free it.

Running takes no lock and changes no module, so that several threads may run the same block over different samples.
What a sample needs beside its hidden state is in its own :class:`Inputs`; what a thread is doing is thread-local.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from fewbit.errors import InputError
from fewbit.model.checkpoint import Checkpoint
from fewbit.model.families import TUPLE_BLOCKS
from fewbit.model.finite import finite
from fewbit.model.hooks import hooked
from fewbit.model.loading import Loader, under, unexpected
from fewbit.model.parts import beside, family_of, head_of_embedding, surroundings
from fewbit.model.sites import Site, find, in_block
from fewbit.model.skeleton import build
from fewbit.model.surgery import Preparation, Surgery

Callback = Callable[[str, Tensor, int | None], None]
"""``callback(site, x, expert)``: inputs ``x`` (tokens, columns) that the matrix of ``site`` is about to see, or outputs
(tokens, rows) that it has made."""

Calls = tuple[tuple[tuple[Any, ...], Mapping[str, Any]], ...]
"""Positional and named arguments of each block, without the hidden state."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the blocks are called with: the first ``hidden`` (batch, tokens, width) and each block's other arguments."""

    hidden: Tensor
    calls: Calls


class StreamedModel:
    """A causal language model whose parameters are on the meta device until loaded.

    * ``module``: the transformers model. ``config``: its configuration. ``architecture``: its class name.
    * ``blocks``: paths of the blocks in order. ``before`` and ``after``: what :meth:`begin` and :meth:`logits` need.
    * ``surgery``: what rotates the model while it is read, or None.
    * ``sites``: every quantizable matrix. ``kept``: every other parameter and why. ``unused``: tensors without a place,
      but for buffers that old versions stored.
    """

    def __init__(self, checkpoint: Checkpoint, preparation: Preparation | None = None) -> None:
        self.checkpoint = checkpoint
        config = checkpoint.config if preparation is None else preparation.config(checkpoint.config)
        self.module: PreTrainedModel = build(config)
        self.config: PretrainedConfig = self.module.config
        self.architecture = type(self.module).__name__
        self._family, children = family_of(self.module)
        self.blocks = [f"{self._family.blocks}.{i}" for i in range(len(children))]
        self._tuples = self._family.tuples or self.config.model_type in TUPLE_BLOCKS
        copies = {} if preparation is None else head_of_embedding(self.module)
        self._loader = Loader(checkpoint, self.module, copies)
        self.unused = unexpected(self.module, [*self._loader.unused, *checkpoint.ignored])
        self.sites, self.kept = find(self.module, self.blocks, self._loader.tied)
        self._by_name = {site.name: site for site in self.sites}
        self.before, self.after = surroundings(self.module, self._family)
        self._beside = beside(self.module, self._family)
        self.surgery: Surgery | None = None
        if preparation is not None:
            tied, around = bool(checkpoint.config.tie_word_embeddings), (self.before, self.after)
            self.surgery = preparation.plan(self.module, self.sites, self.blocks, around, tied)
            self._loader.change = partial(self.surgery.changed, read=lru_cache(self._loader.original))
        self._local = threading.local()
        self._beginning = self._shell_of_beginning()
        self._ending = self._shell_of_ending()
        self._watches: dict[int, tuple[dict[int, Site], Callback, bool]] = {}
        self._latest: Calls = ()

    @staticmethod
    def open(checkpoint: Checkpoint, preparation: Preparation | None = None) -> StreamedModel:
        """The skeleton of ``checkpoint``, checked against its tensors' names and shapes; no weight is read. With a
        ``preparation``, weights are rotated as they are read (:mod:`fewbit.model.surgery`).

        Raises:
            UnsupportedError: the architecture is unknown to transformers or to :mod:`fewbit.model.families`, or cannot
                be prepared like that.
            InputError: tensors are missing or of the wrong shape.
        """
        return StreamedModel(checkpoint, preparation)

    def load(self, prefix: str, dtype: torch.dtype = torch.float32) -> None:
        """Make the parameters under ``prefix`` real; the empty prefix is the whole model.

        A tied head shares the embedding's storage when that is loaded, else it is read again.
        """
        self._loader.load(prefix, dtype)

    def original(self, name: str) -> Tensor:
        """The parameter ``name`` in float64 as the checkpoint has it, whatever a preparation makes of it."""
        return self._loader.original(name)

    def free(self, prefix: str) -> None:
        """Drop the parameters under ``prefix``."""
        self._loader.free(prefix)

    @contextmanager
    def loaded(self, *prefixes: str) -> Iterator[None]:
        """While open, the parameters under each of ``prefixes`` are real."""
        for prefix in prefixes:
            self.load(prefix)
        try:
            yield
        finally:
            for prefix in prefixes:
                self.free(prefix)

    def begin(self, ids: Tensor) -> Inputs:
        """Embed ``ids`` (batch, tokens) and find what each block is called with; ``before`` must be loaded."""
        self._local.calls, self._local.hidden = [], None
        self._beginning(input_ids=ids, use_cache=False)
        hidden, calls = self._local.hidden, tuple(self._local.calls)
        self._local.calls, self._local.hidden = [], None
        # Masks and position embeddings hardly ever depend on the sample: keep one copy, not one a sample.
        latest = self._latest
        if _equal(calls, latest):
            calls = latest
        self._latest = calls
        return Inputs(hidden, calls)

    def run_block(self, index: int, hidden: Tensor, inputs: Inputs) -> Tensor:
        """Block ``index`` applied to ``hidden`` (batch, tokens, width); the block must be loaded."""
        arguments, named = inputs.calls[index]
        with self._watching(index):
            out = self.module.get_submodule(self.blocks[index])(hidden, *arguments, **named)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def run_finite(self, index: int, hidden: Tensor, inputs: Inputs) -> Tensor:
        """:meth:`run_block`.

        Raises:
            InputError: what it makes holds NaN or infinity; the message names the layer where that begins.
        """
        return self.finite(index, hidden, inputs, self.run_block(index, hidden, inputs))

    def finite(self, index: int, hidden: Tensor, inputs: Inputs, made: Tensor) -> Tensor:
        """``made``, which is what block ``index`` makes of ``hidden``; refused as :meth:`run_finite` does."""
        (arguments, named), path = inputs.calls[index], self.blocks[index]
        return finite(made, path, self.module.get_submodule(path), lambda block: block(hidden, *arguments, **named))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of the last block's output; ``after`` must be loaded."""
        return self._end(self._ending, hidden)

    def logits_as_now(self) -> Callable[[Tensor], Tensor]:
        """:meth:`logits` of copies of what ``after`` holds now, whatever becomes of it."""
        copies = {name: copy.deepcopy(self.module.get_submodule(name)) for name in self.after}
        return partial(self._end, with_replaced(self._ending, copies))

    def _end(self, ending: nn.Module, hidden: Tensor) -> Tensor:
        self._local.hidden = hidden
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            return ending(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
        finally:
            self._local.hidden = None

    @contextmanager
    def observe(
        self, index: int, callback: Callback, sites: set[str] | None = None, outputs: bool = False
    ) -> Iterator[None]:
        """While open, each run of block ``index`` calls ``callback`` with the inputs of its sites (all, or those named
        in ``sites``), or with their ``outputs``: the very tensors that the block goes on with, in their own shape.

        Fused experts are reported once an expert with the tokens routed to it, and not at all without tokens.
        The callback runs in the thread that runs the block.
        """
        chosen = [site for site in in_block(self.sites, index) if sites is None or site.name in sites]
        experts = {
            self._parameter(site).untyped_storage().data_ptr(): site for site in chosen if site.kind == "experts"
        }
        modules = [(site.name, self.module.get_submodule(site.name)) for site in chosen if site.kind != "experts"]
        if experts:
            self._watches[index] = (experts, callback, outputs)
        try:
            with hooked(
                module.register_forward_hook(_made_by(name, callback))
                if outputs
                else module.register_forward_pre_hook(_reporter(name, callback))
                for name, module in modules
            ):
                yield
        finally:
            self._watches.pop(index, None)

    def site(self, name: str) -> Site:
        """The site of that name."""
        if name not in self._by_name:
            raise InputError(f"site {name}", "the model has none of that name", f"such as {self.sites[0].name}")
        return self._by_name[name]

    def weight(self, name: str) -> Tensor:
        """The loaded weight of a site: (rows, columns), or (experts, rows, columns) for fused experts; a view."""
        site = self.site(name)
        stored = self._parameter(site).detach()
        return stored.transpose(-1, -2) if site.transposed else stored

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Overwrite a loaded site in place with ``weight``, shaped as :meth:`weight` gives it."""
        place = self.weight(name)
        if weight.shape != place.shape:
            raise InputError(
                f"writing site {name}", f"a weight of shape {tuple(weight.shape)}", f"{tuple(place.shape)}"
            )
        place.copy_(weight)

    def materialised(self) -> int:
        """Number of parameters that are in memory now; a shared one counts once."""
        return sum(value.numel() for value in self.module.parameters() if not value.is_meta)

    def _parameter(self, site: Site) -> nn.Parameter:
        parameter: nn.Parameter = self.module.get_parameter(site.parameter)
        if parameter.is_meta:
            raise InputError(
                f"the weight of {site.name}", "it is not loaded", f"load({site.name.rpartition('.')[0]!r})"
            )
        return parameter

    def _watching(self, index: int) -> AbstractContextManager[Any]:
        watch = self._watches.get(index)
        return _ExpertWatch(*watch) if watch is not None else nullcontext()

    def _shell_of_beginning(self) -> nn.Module:
        replaced: dict[str, nn.Module] = {name: _Recorder(self._local, self._tuples) for name in self.blocks}
        return with_replaced(self.module, {**replaced, **{name: nn.Identity() for name in self.after + self._beside}})

    def _shell_of_ending(self) -> nn.Module:
        replaced: dict[str, nn.Module] = {name: _Feeder(self._local, self._tuples) for name in self.blocks}
        replaced |= {name: nn.Identity() for name in self._beside}  # a model's device is its first parameter's
        for name in self.before:
            module = self.module.get_submodule(name)
            if isinstance(module, nn.Embedding):
                replaced[name] = _Nothing(module.embedding_dim, axes=0)
            elif isinstance(module, nn.Linear):
                replaced[name] = _Nothing(module.out_features, axes=1)
            else:
                replaced[name] = nn.Identity()
        return with_replaced(self.module, replaced)


class _Recorder(nn.Module):
    """Stands for a block: notes what it is called with and passes the hidden state on."""

    def __init__(self, local: threading.local, tuples: bool) -> None:
        super().__init__()
        self._local, self._tuples = local, tuples

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        if self._local.hidden is None:
            self._local.hidden = hidden_states
        self._local.calls.append((arguments, named))
        return (hidden_states,) if self._tuples else hidden_states


class _Feeder(nn.Module):
    """Stands for a block: gives the hidden state at hand, whatever comes in."""

    def __init__(self, local: threading.local, tuples: bool) -> None:
        super().__init__()
        self._local, self._tuples = local, tuples

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        return (self._local.hidden,) if self._tuples else self._local.hidden


class _Nothing(nn.Module):
    """Stands for an embedding, or a projection of one, whose result does not matter: zeros (..., width).

    ``axes`` of the input, at its end, give way to ``width``: none for ids, one for vectors.
    """

    def __init__(self, width: int, axes: int) -> None:
        super().__init__()
        self._width, self._axes = width, axes

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return torch.zeros(*x.shape[: x.ndim - self._axes], self._width, device=x.device)


class _ExpertWatch(TorchFunctionMode):
    """Reports products with a slice of a stacked expert parameter; active in one thread.

    A slice ``parameter[e]`` shares its parameter's storage, and its offset there says which expert it is.
    """

    PRODUCTS = (torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __init__(self, experts: Mapping[int, Site], callback: Callback, outputs: bool) -> None:
        super().__init__()
        self._experts, self._callback, self._outputs = experts, callback, outputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            x, weight = args[0], args[1]
            site = self._experts.get(weight.untyped_storage().data_ptr())
            if site is not None and weight.ndim == 2:
                expert = weight.storage_offset() // (site.shape[0] * site.shape[1])
                if self._outputs:
                    y = func(*args, **(kwargs or {}))
                    self._callback(site.name, y, expert)
                    return y
                self._callback(site.name, x.reshape(-1, x.shape[-1]), expert)
        return func(*args, **(kwargs or {}))


def _reporter(name: str, callback: Callback) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def report(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        callback(name, x.reshape(-1, x.shape[-1]), None)

    return report


def _made_by(name: str, callback: Callback) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    return lambda module, arguments, y: callback(name, y, None)


def _equal(one: Any, other: Any) -> bool:
    """Whether two trees of arguments hold the same values; False when in doubt."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return isinstance(one, (int, float, str)) and one == other


def with_replaced(module: nn.Module, replaced: Mapping[str, nn.Module], path: str = "") -> nn.Module:
    """A twin of ``module`` that shares everything with it but the submodules at the paths in ``replaced``."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for name, child in module._modules.items():
        own = f"{path}.{name}" if path else name
        if own in replaced:
            twin._modules[name] = replaced[own]
        elif child is not None and any(under(other, own) for other in replaced):
            twin._modules[name] = with_replaced(child, replaced, own)
    return twin


def with_weight(module: nn.Module, site: Site, values: Tensor) -> nn.Module:
    """A twin of the layer ``module`` at ``site`` that multiplies by ``values`` (rows, columns), and shares the rest."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    lying = values.T if site.transposed else values
    twin._parameters[site.parameter.rpartition(".")[2]] = lying  # type: ignore[assignment]
    return twin
