# SPDX-License-Identifier: Apache-2.0
"""Products of two activations that a network's own code writes out, given to modules: no line of it is changed.

One run finds them. While the network runs on a batch, every call of ``@``, ``torch.matmul``, ``bmm``, ``mm``,
``einsum`` and ``scaled_dot_product_attention`` is seen, and belongs to the innermost module that runs; it is a product
of activations unless an operand is made of parameters and buffers alone. A module that multiplies then gets children,
``inline.0``, ``inline.1``, ..., each a :class:`fewbit.model.product.Product`, in the order of its calls, and a class
derived from its own whose ``forward`` hands those calls to them. From there on they are products as any other.

What is kept is the list of a module's calls, each with the number of products in it (0: left alone). It holds at any
size of input; a forward that makes other calls, or in another order, is refused by the module's name.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fewbit.errors import UnsupportedError
from fewbit.model.hooks import hooked
from fewbit.model.product import Product
from fewbit.network.feeding import Batch, feed
from fewbit.network.fold import MOVED, distance

Call = tuple[str, int]
"""Of which kind, and how many products of activations are in it."""
CHILD = "inline"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def place_products(network: nn.Module, batch: Batch) -> list[str]:
    """Give every product of two activations that the code of ``network`` writes out a :class:`Product`, in place.

    Args:
        network: it is put in evaluation mode.
        batch: of its inputs; it is run on it, in float64.

    Returns:
        Names of the new products. None where nothing was found.

    Raises:
        UnsupportedError: a module makes other calls each time that it runs, or cannot have children, or the output
            moved; the message names it. The network is then as it was.
    """
    network.eval()
    exact = copy.deepcopy(network).double()
    finder = _Finder(exact)
    before = finder.run(batch)
    for name, calls in finder.plans.items():
        place(exact, name, calls)
    if not finder.plans:
        return []
    moved = distance(feed(exact, batch), before)
    if not moved <= MOVED:
        found = f"the output moved by {moved:.3g} of its largest value"
        raise UnsupportedError(f"products of {', '.join(finder.plans)}", found, "fewbit.network.Product by hand")
    for name, calls in finder.plans.items():
        place(network, name, calls)
    modules = network.named_modules()
    return [name for name, module in modules if name.split(".")[-2:-1] == [CHILD] and type(module) is Product]


def place(network: nn.Module, name: str, calls: Sequence[Call]) -> None:
    """Give the module ``name`` of ``network`` a Product for each in ``calls``, and what hands them over."""
    module = network.get_submodule(name)
    works = "fewbit.network.Product by hand"
    if isinstance(module, _CONTAINERS):
        found = f"a {type(module).__name__} runs all its children: it can have none beside them"
        raise UnsupportedError(f"products of {name or 'the network'}", found, works)
    if hasattr(module, CHILD):
        found = f"it has something called {CHILD} already"
        raise UnsupportedError(f"products of {name or 'the network'}", found, works)
    module.__class__ = _derived(type(module))  # type: ignore[arg-type]
    module.add_module(CHILD, nn.ModuleList(Product() for _ in range(sum(count for _, count in calls))))
    module.inline_calls = name, tuple((kind, count) for kind, count in calls)  # type: ignore[assignment]


def placed(network: nn.Module) -> dict[str, list[list[Any]]]:
    """What :func:`place` did to ``network``, as a manifest has it: by module, [kind, products] of its calls."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, _Inline))
    return {name: [list(call) for call in module.inline_calls[1]] for name, module in found}


class _Inline(nn.Module):
    """Mixed into the class of a module whose products were placed."""

    inline_calls: tuple[str, tuple[Call, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Handing(self) as handing:
            output = super().forward(*args, **kwargs)
        handing.end()
        return output


@functools.cache
def _derived(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Inline, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


class _Handing(TorchFunctionMode):
    """While open, calls that ``module`` makes go to its products, in their order."""

    def __init__(self, module: _Inline) -> None:
        super().__init__()
        self._name, self._calls = module.inline_calls
        self._products: list[nn.Module] = list(module.get_submodule(CHILD).children())
        self._at = self._used = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, KINDS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        if self._at >= len(self._calls) or self._calls[self._at][0] != kind:
            self._refuse(f"call {self._at + 1} is of {kind}")
        count, first = self._calls[self._at][1], self._used
        self._at, self._used = self._at + 1, self._used + count
        with torch._C.DisableTorchFunction():  # what a module around this one hands over is its own
            if not count:
                return func(*args, **kwargs)
            return RUN[kind](self._products[first : first + count], *args, **kwargs)

    def end(self) -> None:
        if self._at != len(self._calls):
            self._refuse(f"there are {self._at}")

    def _refuse(self, found: str) -> None:
        seen = ", ".join(kind for kind, _ in self._calls)
        what = f"it made calls of {seen} when they were found, and now {found}"
        works = "a module whose products are the same in every run, or no place_products"
        raise UnsupportedError(f"products of {self._name or 'the network'}", what, works)


class _Finder(TorchFunctionMode):
    """``plans``: calls by module, of the modules that multiply activations, and of those within them that multiply."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network, self._seen = network, dict[str, list[Call]]()
        self._running: list[tuple[str, bool, list[Call]]] = []
        self._constant = WeakIdKeyDictionary()
        for tensor in (*network.parameters(), *network.buffers()):
            self._constant[tensor] = True

    def run(self, batch: Batch) -> Any:
        with self._watched(), self:
            return feed(self._network, batch)

    @property
    def plans(self) -> dict[str, list[Call]]:
        multiply = [name for name, calls in self._seen.items() if any(count for _, count in calls)]
        within = tuple(f"{name}." if name else "" for name in multiply)
        return {n: calls for n, calls in self._seen.items() if calls and (n in multiply or n.startswith(within))}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, KINDS.get(func)
        if kind is not None and self._running and not self._running[-1][1]:
            self._running[-1][2].append((kind, self._count(kind, *args, **kwargs)))
        made = func(*args, **kwargs)
        into = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(tensor in self._constant for tensor in into):
            for leaf in tree_leaves(made):
                if isinstance(leaf, Tensor):
                    self._constant[leaf] = True
        elif func is Tensor.__setitem__ or made is into[0]:  # changed in place
            self._constant.pop(into[0], None)
        return made

    def _count(self, kind: str, *args: Any, **kwargs: Any) -> int:
        operands = OPERANDS[kind](*args, **kwargs)
        able = all(o.dim() > 1 and o.is_floating_point() and o not in self._constant for o in operands)
        return max(len(operands) - 1, 0) if able else 0

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def enter(name: str) -> Callable[..., None]:
            return lambda module, args: self._running.append((name, type(module) is Product, []))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            name, _, calls = self._running.pop()
            if self._seen.setdefault(name, calls) != calls:
                found = "it makes other calls each time that it runs"
                raise UnsupportedError(f"products of {name or 'the network'}", found, "fewbit.network.Product by hand")

        modules = list(self._network.named_modules())
        entering = (module.register_forward_pre_hook(enter(name)) for name, module in modules)
        leaving = (module.register_forward_hook(leave) for _, module in modules)
        with hooked(entering), hooked(leaving):
            yield


def _two(*args: Any, **kwargs: Any) -> list[Tensor]:
    """Operands of a product; none where its result goes elsewhere (``out=``) or into another dtype."""
    named = [kwargs[key] for key in ("input", "self", "other", "mat2", "tensor2") if key in kwargs]
    given = [*args, *named]
    return given if len(given) == 2 and len(args) + len(kwargs) == 2 else []


def _multiply(products: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    return products[0](*_two(*args, **kwargs))


def _summed(equation: Any, *operands: Any, **kwargs: Any) -> list[Tensor]:
    """Operands of a sum that is one matrix product of two, in batches; none of any other."""
    given = list(operands[0]) if operands and isinstance(operands[0], (list, tuple)) else list(operands)
    letters = str(equation).replace(" ", "")
    sides, _, out = letters.partition("->")
    both = sides.split(",")
    if "->" not in letters or "." in letters or len(both) != 2 or len(given) != 2 or kwargs:
        return []
    left, right = map(set, both)
    single = all(len(set(part)) == len(part) for part in (*both, out))
    inner = (left & right) - set(out)
    return given if single and inner and (left ^ right) <= set(out) <= (left | right) else []


def _sum(products: list[nn.Module], equation: Any, *operands: Any, **kwargs: Any) -> Any:
    a, b = _summed(equation, *operands, **kwargs)
    sides, _, out = str(equation).replace(" ", "").partition("->")
    left, right = sides.split(",")
    batch = [c for c in left if c in right and c in out]
    inner = [c for c in left if c in right and c not in out]
    rows, columns = ([c for c in part if c not in other] for part, other in ((left, right), (right, left)))
    size = dict(zip(right, b.shape, strict=True)) | dict(zip(left, a.shape, strict=True))

    def matrix(x: Tensor, own: str, first: list[str], second: list[str]) -> Tensor:
        x = x.permute([own.index(c) for c in (*batch, *first, *second)])
        shape = [math.prod(size[c] for c in part) for part in (first, second)]
        return x.reshape(*x.shape[: len(batch)], *shape)

    y = products[0](matrix(a, left, rows, inner), matrix(b, right, inner, columns))
    made = [*batch, *rows, *columns]
    return y.reshape([size[c] for c in made]).permute([made.index(c) for c in out])


def _attended(query: Tensor, key: Tensor, value: Tensor, *more: Any, **kwargs: Any) -> list[Tensor]:
    """Queries, keys and values; none with dropout."""
    return [] if kwargs.get("dropout_p", more[1] if len(more) > 1 else 0.0) else [query, key, value]


def _attend(
    products: list[nn.Module],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch defines it: softmax(scale q k^T + mask) v. A row of which nothing is seen gives zeros."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = products[0](query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    mixed: Tensor = products[1](weights, value)
    return mixed


KINDS: dict[Any, str] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), "matmul"),
    **dict.fromkeys((torch.mm, Tensor.mm), "matmul"),
    torch.einsum: "einsum",
    nn.functional.scaled_dot_product_attention: "attention",
}
"""Functions whose calls are seen, by kind."""
OPERANDS: dict[str, Callable[..., list[Tensor]]] = {"matmul": _two, "einsum": _summed, "attention": _attended}
RUN: dict[str, Callable[..., Any]] = {"matmul": _multiply, "einsum": _sum, "attention": _attend}
