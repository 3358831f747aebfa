# SPDX-License-Identifier: Apache-2.0
"""Quantized layers: torch modules whose buffers are the arrays of a file, run by the kernel table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import formats, kernels
from fewbit.containers import terms as T
from fewbit.core import rewrite as R
from fewbit.core.forks import lock
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor, stack, unstack
from fewbit.errors import InputError, UnsupportedError, VerificationError
from fewbit.kernels.inputs import uncompiled
from fewbit.model.float_weight import FloatWeight

_preparing = lock()  # first calls from several threads would each take arrays that another has dropped


def check_shape(weight: T.Weight, expected: tuple[int, int], module: nn.Module) -> None:
    """Raises InputError unless ``weight`` is of the shape that ``module`` has."""
    if weight.shape != expected:
        found = f"its weight is {expected}"
        raise InputError(f"a weight of {weight.shape} for {module}", found, "the same would work")


class Store(nn.Module):
    """A weight as buffers ``weight_{array}``: one quantized matrix (or experts stacked by rows), or a sum of terms;
    abstract over its use.

    ``plain``: its description (:mod:`fewbit.containers.terms`); ``weight``: what it describes, whose arrays are taken
    as they are, or None where they will be loaded.
    """

    _released = False

    def __init__(self, plain: T.Plain, weight: T.Weight | None = None) -> None:
        super().__init__()
        self.plain = plain
        if weight is None:
            found = {array: torch.empty(size, dtype=dtype) for array, (dtype, size) in self.arrays.items()}
        else:
            found = T.arrays(weight, plain)
        for array, tensor in found.items():
            self.register_buffer(f"weight_{array}", tensor)

    @property
    def arrays(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every array."""
        return T.sizes(self.plain)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight."""
        rows, columns = self.plain["shape"]
        return rows, columns

    def weight_of(self) -> T.Weight:
        """The stored weight, sharing the buffers' memory.

        Raises:
            VerificationError: a buffer changed its dtype after loading, which would change the numbers.
        """
        tensors = {array: getattr(self, f"weight_{array}") for array in self.arrays}
        for array, (dtype, size) in self.arrays.items():
            if tensors[array].dtype != dtype or tuple(tensors[array].shape) != size:
                found = f"found {tensors[array].dtype} {tuple(tensors[array].shape)}"
                works = "casting a layer's inputs alone: it computes in their dtype"
                raise VerificationError(f"array weight_{array}: {dtype} {size}", found, works)
        return T.restore(self.plain, tensors)

    def qtensor(self) -> QTensor:
        """The same, where it is one matrix.

        Raises:
            UnsupportedError: it is a sum of terms.
        """
        weight = self.weight_of()
        if not isinstance(weight, QTensor):
            raise UnsupportedError("the matrix of a layer", "its weight is a sum of terms", "weight_of() gives the sum")
        return weight

    def release(self) -> None:
        """Drop the arrays: a kernel's own layout holds the same codes and parameters from now on."""
        for array in self.arrays:  # empty ones lie where they lay, whatever torch's default device is
            setattr(self, f"weight_{array}", getattr(self, f"weight_{array}").new_empty(0))
        self._released = True

    def regain(self) -> None:
        """Hold the arrays again; the next call prepares them anew, for the fastest kernel."""
        if self._released:
            for array, tensor in T.arrays(self.weight_of(), self.plain).items():
                setattr(self, f"weight_{array}", tensor)
        self._released = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A cast leaves the arrays as they are: rounded, they would be another weight."""
        held = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in held.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Into arrays as a file holds them, whatever form they have in memory."""
        if any(key.startswith(prefix) for key in state_dict):
            self.regain()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The arrays as a file holds them, whatever form they have in memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        there = [key for array in self.arrays if (key := f"{prefix}weight_{array}") in destination]
        if there and not any(destination[key].is_meta for key in there):  # before loading there are but names and sizes
            for array, tensor in T.arrays(self.weight_of(), self.plain).items():
                destination[f"{prefix}weight_{array}"] = tensor

    def extra_repr(self) -> str:
        layout = f", {self.plain['layout']}" if "layout" in self.plain else ""
        return f"{self.shape[1]} -> {self.shape[0]}, {T.summary(self.plain)}{layout}"


class Multiplier(Store):
    """A weight that inputs are multiplied by, and a bias; abstract over what is a token of them.

    ``activation``: a format that inputs are rounded to per token, or None. ``dtype``: of the float weight, torch's
    default where it is None; it follows casts of the network. ``name``: where it is in the network, for errors.
    """

    bias: nn.Parameter | None
    activation: Format | None = None
    name = ""
    _prepared: kernels.Prepared | None = None

    def __init__(
        self,
        plain: T.Plain,
        bias: nn.Parameter | None,
        activation: str | None,
        weight: T.Weight | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(plain, weight)
        self.bias = bias
        self._like = torch.empty(1, dtype=dtype, device="cpu")  # no buffer: it is in no file
        if activation:
            self.activation = formats.parse(activation)

    def _float_weight(self, shape: tuple[int, ...], function: Any, run: Any) -> FloatWeight:
        return FloatWeight(self.name or repr(self), self._like.expand(shape), function, run)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._like = fn(self._like)
        return super()._apply(fn, recurse)

    def prepare(self, kernel: str | None = None) -> None:
        """Repack for the fastest kernel here (or the one named), once, before the first call."""
        self._prepared = kernels.prepare(self.weight_of(), kernel, self.activation)
        self.release()

    def weight_of(self) -> T.Weight:
        return super().weight_of() if self._prepared is None else self._prepared.weight()

    @property
    def prepared(self) -> kernels.Prepared:
        if self._prepared is None:
            with _preparing:
                if self._prepared is None:
                    self.prepare()
        assert self._prepared is not None
        return self._prepared

    def regain(self) -> None:
        super().regain()
        self._prepared = None

    def round_inputs(self, format: Format | None) -> None:
        """From now on round inputs to ``format``, token by token; the codes stay where they are."""
        stored = self.weight_of()
        self.activation = format
        self._prepared = kernels.prepare(stored, activation=format)
        self.release()


class QuantLinear(Multiplier):
    """``y = x W^T + b`` with W in few bits, one quantized matrix or a sum of terms.

    ``rewrites``: kinds of what inputs go through before they are rounded, whose arrays are the buffers
    ``input_{position}_{array}``.
    """

    rewrites: tuple[str, ...] = ()
    _rewrite: R.Chain | None = None
    _rewriting: kernels.Rewriting | None = None

    def __init__(
        self,
        plain: T.Plain,
        bias: nn.Parameter | None,
        activation: str | None = None,
        rewrites: Sequence[str] = (),
        weight: T.Weight | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(plain, bias, activation, weight, dtype)
        self.out_features, self.in_features = self.shape
        if rewrites:
            self.rewrites = tuple(rewrites)
        for array, (dtype, size) in R.storage(self.rewrites, self.in_features).items():
            self.register_buffer(f"input_{array}", torch.empty(size, dtype=dtype))

    @property
    def weight(self) -> FloatWeight:
        """What a network's own code may ask of the float weight; :meth:`weight_of` gives what is stored."""
        return self._float_weight(self.shape, nn.functional.linear, self._multiply)

    @classmethod
    def of(cls, linear: nn.Linear, weight: T.Weight, activation: str | None = None) -> QuantLinear:
        """``linear`` with its weight replaced by ``weight``, matrices in the layouts that they are in; the bias is
        shared.

        Raises:
            InputError: the weight is of another shape.
        """
        check_shape(weight, (linear.out_features, linear.in_features), linear)
        bias = linear.bias if isinstance(linear.bias, nn.Parameter) else None
        made = cls(T.describe(weight), bias, activation, weight=weight, dtype=linear.weight.dtype)
        return made.train(linear.training)

    def prepare(self, kernel: str | None = None) -> None:
        self._rewrite = self.rewrite()
        self._rewriting = kernels.Rewriting(self._rewrite)
        super().prepare(kernel)  # last: what it sets says that all is ready

    def regain(self) -> None:
        super().regain()
        self._rewrite = self._rewriting = None

    def rewrite(self) -> R.Chain:
        """What inputs go through first, sharing the buffers' memory.

        Raises:
            VerificationError: a buffer changed its dtype after loading, or holds what it cannot.
        """
        if self._rewrite is not None:
            return self._rewrite
        names = R.storage(self.rewrites, self.in_features)
        try:
            return R.restore(self.rewrites, self.in_features, {name: getattr(self, f"input_{name}") for name in names})
        except InputError as error:
            raise VerificationError(error.asked, error.found, error.works) from None

    @uncompiled
    def forward(self, input: Tensor) -> Tensor:
        return self._multiply(input, self.bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.rewrites:
            return self.prepared(x, bias)
        # Rewritten inputs stay in float32: rounding them to a shorter dtype of x would be one rounding more.
        prepared, rewriting = self.prepared, self._rewriting
        assert rewriting is not None
        return prepared(rewriting(x), bias).to(x.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What is used is what is saved, also after a cast of the buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._rewrite is not None:
            destination.update({f"{prefix}input_{name}": tensor for name, tensor in self._rewrite.arrays.items()})


class QuantEmbedding(Store):
    """Rows of a table in few bits; ``scale`` multiplies them where the family does (Gemma). ``name``: where it is, for
    errors."""

    name = ""

    def __init__(
        self, format: str, layout: str, shape: tuple[int, int], scale: float | None, dtype: torch.dtype
    ) -> None:
        super().__init__(T.dense(format, layout, shape))
        self.scale, self.dtype = scale, dtype
        self.num_embeddings, self.embedding_dim = shape
        self._head: list[QuantLinear] = []  # in a list: the head is no child of the embedding

    @property
    def weight(self) -> FloatWeight:
        """What a network's own code, and transformers', may ask of the float table."""
        like = torch.empty(1, dtype=self.dtype, device="cpu").expand(self.shape)
        return FloatWeight(self.name or repr(self), like, nn.functional.embedding, self._rows)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(1, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def share(self, head: QuantLinear) -> None:
        """Let a tied head's kernel hold the one copy of the matrix; rows are looked up in its layout."""
        self._head = [head]
        self.release()

    def regain(self) -> None:
        """The head keeps a matrix of its own."""
        super().regain()
        self._head = []

    def weight_of(self) -> T.Weight:
        return self._head[0].weight_of() if self._head else super().weight_of()

    @uncompiled
    def forward(self, ids: Tensor) -> Tensor:
        rows = self._rows(ids)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def _rows(self, ids: Tensor, padding: Any = None, *, max_norm: Any = None, **_: Any) -> Tensor:
        """As ``torch.nn.functional.embedding`` is called; what else that takes is about gradients of the table."""
        if max_norm is not None:
            raise self.weight.refusal("max_norm, which changes the table,")
        return kernels.embedding(ids, self.qtensor(), self.dtype)


class ExpertBank(Store):
    """A fused (experts, rows, columns) parameter in few bits: ``bank[e]`` stands for expert e's matrix in F.linear."""

    def __init__(self, format: str, layout: str, shape: tuple[int, int], experts: int) -> None:
        super().__init__(T.dense(format, layout, (shape[0] * experts, shape[1])))
        self.experts, self.rows = experts, shape[0]
        self._prepared: dict[int, kernels.PreparedMatrix] = {}

    def prepare(self, kernel: str | None = None) -> None:
        """As :meth:`QuantLinear.prepare`, for every expert."""
        parts = unstack(self.qtensor(), [self.rows] * self.experts)
        self._prepared = {expert: kernels.prepare(part, kernel) for expert, part in enumerate(parts)}
        self.release()

    def regain(self) -> None:
        super().regain()
        self._prepared = {}

    def weight_of(self) -> T.Weight:
        """All experts stacked by rows."""
        if not self._prepared:
            return super().weight_of()
        return stack([self._prepared[expert].qtensor() for expert in range(self.experts)])

    @uncompiled
    def __getitem__(self, expert: Any) -> ExpertMatrix:
        if not self._prepared:
            with _preparing:
                if not self._prepared:
                    self.prepare()
        return ExpertMatrix(self._prepared[int(expert)])


class ExpertMatrix:
    """Stands where a family's own code writes ``F.linear(x, self.gate_up_proj[e])`` or ``x @ self.gate_up_proj[e]``
    (families that keep their experts transposed): runs the kernel instead."""

    def __init__(self, prepared: kernels.PreparedMatrix) -> None:
        self._prepared = prepared

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self._prepared(x, None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return NotImplemented
        x, matrix, *bias = args
        return matrix._prepared(x, *(bias or [(kwargs or {}).get("bias")]))


def round_inputs(model: nn.Module, format: Format) -> None:
    """Round inputs to ``format`` in every layer that multiplies and was not quantized together with them."""
    for module in model.modules():
        if isinstance(module, Multiplier) and module.activation is None:
            module.round_inputs(format)
