# SPDX-License-Identifier: Apache-2.0
"""What stands at ``weight`` of a quantized layer, for networks whose own code asks for it.

Code of networks asks a layer for its weight for two reasons: what it is like (vision transformers cast images to its
dtype, T5 casts before a projection), and to multiply by it (``F.linear(x, self.qkv.weight, self.qkv.bias)`` in Swin's
windows). Both are answered without a float copy. Anything else would need one, and is refused by the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from fewbit.errors import UnsupportedError
from fewbit.kernels.inputs import uncompiled

FACTS = {"dtype", "is_complex", "is_floating_point", "element_size", "itemsize"}
FACTS |= {"device", "get_device", "is_cpu", "is_cuda", "is_meta", "layout", "requires_grad"}
FACTS |= {"shape", "size", "ndim", "dim", "ndimension", "numel", "nelement"}
FACTS |= {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}
"""Attributes of a tensor that follow from dtype, device and shape."""
LIKE = {Tensor.to, Tensor.type_as, torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like}
"""Functions that ask another tensor for nothing else."""


def _operator(name: str) -> Callable[..., Any]:
    def refuse(self: FloatWeight, *_: Any) -> Any:
        raise self.refusal(name)

    return refuse


class FloatWeight:
    """Stands for the float weight of the layer ``name``, which holds codes. Not a ``torch.Tensor``.

    Args:
        like: of its dtype, device and shape; one element, expanded.
        function: what of torch multiplies by such a weight, ``torch.nn.functional.linear`` for one.
        run: called in its place, with the input, the bias or None, and whatever else it was given.
    """

    def __init__(self, name: str, like: Tensor, function: Callable[..., Any], run: Callable[..., Tensor]) -> None:
        self._name, self._like, self._function, self._run = name, like, function, run

    def refusal(self, asked: str) -> UnsupportedError:
        """The error of whoever asks for ``asked``."""
        found = f"the network's own code asks for {asked} of that layer's weight, of which there are codes: "
        found += f"{resolve_name(self._function)} takes them, and nothing else"
        works = f'format "float" in a rule with match = "{self._name}"'
        return UnsupportedError(f"quantizing {self._name}", found, works)

    def __getattr__(self, name: str) -> Any:
        if name in FACTS:
            return getattr(self._like, name)
        raise AttributeError(str(self.refusal(f"{name!r}")), name=name, obj=self)

    def __len__(self) -> int:
        return len(self._like)

    def __repr__(self) -> str:
        return f"FloatWeight({self._name}, {tuple(self._like.shape)}, {self._like.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        asked: FloatWeight = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        return asked._call(func, args, kwargs or {})

    @uncompiled
    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in LIKE:
            args, kwargs = tree_map(lambda leaf: self._like if leaf is self else leaf, (args, kwargs))
            return func(*args, **kwargs)
        if func is not self._function:
            raise self.refusal(resolve_name(func) or getattr(func, "__name__", str(func)))
        x, weight, bias, rest, named = arguments(*args, **kwargs)
        if weight is not self or not isinstance(x, Tensor) or isinstance(bias, FloatWeight):
            raise self.refusal("the input or the bias")
        return self._run(x, bias, *rest, **named)

    __add__, __sub__, __mul__, __truediv__, __pow__, __matmul__ = map(_operator, ("+", "-", "*", "/", "**", "@"))
    __radd__, __rsub__, __rmul__, __rtruediv__, __rmatmul__ = map(_operator, ("+", "-", "*", "/", "@"))
    __lt__, __le__, __gt__, __ge__ = map(_operator, ("<", "<=", ">", ">="))
    __neg__, __abs__, __float__, __getitem__ = map(_operator, ("-", "abs", "float", "[...]"))
    __eq__, __ne__ = map(_operator, ("==", "!="))
    __hash__ = object.__hash__


def arguments(
    input: Any, weight: Any, bias: Any = None, *rest: Any, **named: Any
) -> tuple[Any, Any, Any, tuple[Any, ...], dict[str, Any]]:
    """Of ``torch.nn.functional.linear`` or a convolution: input, weight, bias, and what is left."""
    return input, weight, bias, rest, named
