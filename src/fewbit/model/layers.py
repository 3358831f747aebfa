# SPDX-License-Identifier: Apache-2.0
"""Quantized layers: torch modules whose buffers are the arrays of a file, run by the kernel table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import formats, kernels, layouts
from fewbit.core import rewrite as R
from fewbit.core.format import Format
from fewbit.core.layout import Layout
from fewbit.core.qtensor import QTensor, stack, storage
from fewbit.errors import InputError, VerificationError


class Store(nn.Module):
    """One quantized matrix (or experts stacked by rows) as buffers ``weight_{array}``; abstract over its use."""

    def __init__(self, format: str, layout: str, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.format: Format = formats.parse(format)
        self.layout: Layout = layouts.named(layout)
        self.arrays = storage(self.format, self.layout, shape)
        for array, (dtype, size) in self.arrays.items():
            self.register_buffer(f"weight_{array}", torch.empty(size, dtype=dtype))

    def qtensor(self) -> QTensor:
        """The stored matrix, sharing the buffers' memory.

        Raises:
            VerificationError: a buffer changed its dtype after loading, which would change the numbers.
        """
        tensors = {array: getattr(self, f"weight_{array}") for array in self.arrays}
        for array, (dtype, size) in self.arrays.items():
            if tensors[array].dtype != dtype or tuple(tensors[array].shape) != size:
                found = f"{tensors[array].dtype} {tuple(tensors[array].shape)}"
                raise VerificationError(f"array weight_{array}: {dtype} {size}", f"found {found}")
        return QTensor(self.format, self.layout, self.shape, tensors.pop("packed"), tensors)

    def release(self) -> None:
        """Drop the arrays: a kernel's own layout holds the same codes and parameters from now on."""
        for array, (dtype, _) in self.arrays.items():
            setattr(self, f"weight_{array}", torch.empty(0, dtype=dtype))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The arrays as a file holds them, whatever form they have in memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if f"{prefix}weight_packed" in destination:
            stored = self.qtensor()
            if stored.layout is not self.layout:  # while a model is loaded, arrays are on the meta device as they are
                stored = stored.repack(self.layout)
            for array, tensor in {"packed": stored.packed, **stored.params}.items():
                destination[f"{prefix}weight_{array}"] = tensor

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {self.format.name}, {self.layout.name}"


class Multiplier(Store):
    """A matrix that inputs are multiplied by, and a bias; abstract over what is a token of them.

    ``activation``: a format that inputs are rounded to per token, or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self, format: str, layout: str, shape: tuple[int, int], bias: nn.Parameter | None, activation: str | None
    ) -> None:
        super().__init__(format, layout, shape)
        self.bias = bias
        self.activation = formats.parse(activation) if activation else None
        self._prepared: kernels.PreparedMatrix | None = None

    def prepare(self, kernel: str | None = None) -> None:
        """Repack for the fastest kernel here (or the one named), once, before the first call."""
        self._prepared = kernels.prepare(self.qtensor(), kernel, self.activation)
        self.release()

    def qtensor(self) -> QTensor:
        return super().qtensor() if self._prepared is None else self._prepared.qtensor()

    @property
    def prepared(self) -> kernels.PreparedMatrix:
        if self._prepared is None:
            self.prepare()
        assert self._prepared is not None
        return self._prepared

    def round_inputs(self, format: Format | None) -> None:
        """From now on round inputs to ``format``, token by token; the codes stay where they are."""
        stored = self.qtensor()
        self.activation = format
        self._prepared = kernels.prepare(stored, activation=format)
        self.release()


class QuantLinear(Multiplier):
    """``y = x W^T + b`` with W in few bits.

    ``rewrites``: kinds of what inputs go through before they are rounded, whose arrays are the buffers
    ``input_{position}_{array}``.
    """

    def __init__(
        self,
        format: str,
        layout: str,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        activation: str | None = None,
        rewrites: Sequence[str] = (),
    ) -> None:
        super().__init__(format, layout, shape, bias, activation)
        self.rewrites = tuple(rewrites)
        for array, (dtype, size) in R.storage(self.rewrites, shape[1]).items():
            self.register_buffer(f"input_{array}", torch.empty(size, dtype=dtype))
        self._rewrite: R.Chain | None = None
        self.in_features, self.out_features = shape[1], shape[0]

    def prepare(self, kernel: str | None = None) -> None:
        super().prepare(kernel)
        self._rewrite = self.rewrite()

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

    def forward(self, x: Tensor) -> Tensor:
        if not self.rewrites:
            return self.prepared(x, self.bias)
        # Rewritten inputs stay in float32: rounding them to a shorter dtype of x would be one rounding more.
        return self.prepared(self.rewrite().apply(x), self.bias).to(x.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What is used is what is saved, also after a cast of the buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._rewrite is not None:
            destination.update({f"{prefix}input_{name}": tensor for name, tensor in self._rewrite.arrays.items()})


class QuantEmbedding(Store):
    """Rows of a table in few bits; ``scale`` multiplies them where the family does (Gemma)."""

    def __init__(
        self, format: str, layout: str, shape: tuple[int, int], scale: float | None, dtype: torch.dtype
    ) -> None:
        super().__init__(format, layout, shape)
        self.scale, self.dtype = scale, dtype
        self.num_embeddings, self.embedding_dim = shape
        self._head: list[QuantLinear] = []  # in a list: the head is no child of the embedding

    def share(self, head: QuantLinear) -> None:
        """Let a tied head's kernel hold the one copy of the matrix; rows are looked up in its layout."""
        self._head = [head]
        self.release()

    def qtensor(self) -> QTensor:
        return self._head[0].qtensor() if self._head else super().qtensor()

    def forward(self, ids: Tensor) -> Tensor:
        rows = kernels.embedding(ids, self.qtensor(), self.dtype)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)


class ExpertBank(Store):
    """A fused (experts, rows, columns) parameter in few bits: ``bank[e]`` stands for expert e's matrix in F.linear."""

    def __init__(self, format: str, layout: str, shape: tuple[int, int], experts: int) -> None:
        super().__init__(format, layout, (shape[0] * experts, shape[1]))
        self.experts, self.rows = experts, shape[0]
        self._prepared: dict[int, kernels.PreparedMatrix] = {}

    def prepare(self, kernel: str | None = None) -> None:
        """As :meth:`QuantLinear.prepare`, for every expert."""
        whole = super().qtensor()
        codes, params = whole.logical()
        for expert in range(self.experts):
            rows = slice(expert * self.rows, (expert + 1) * self.rows)
            part = QTensor.of(self.format, codes[rows], {key: value[rows] for key, value in params.items()})
            self._prepared[expert] = kernels.prepare(part, kernel)
        self.release()

    def qtensor(self) -> QTensor:
        """All experts stacked by rows."""
        if not self._prepared:
            return super().qtensor()
        return stack([self._prepared[expert].qtensor() for expert in range(self.experts)])

    def __getitem__(self, expert: Any) -> ExpertMatrix:
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
