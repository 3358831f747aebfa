# SPDX-License-Identifier: Apache-2.0
"""The tensors of AWQ checkpoints, version "gemm" (AutoAWQ; ``quant_method: awq``), for K inputs and N outputs, 4 bits.

::

    packed  qweight (K, N / 8) int32        nibble l of word w is output 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[l]
            qzeros  (groups, N / 8) int32   zero points in the same order, as they are (no minus one)
            scales  (groups, N) float16
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.arrays import expect, take
from fewbit.layouts.words import pack_words, params_of, refuse_affine, unpack_words, zeros

_LANES = (0, 2, 4, 6, 1, 3, 5, 7)
_WHERE = tuple(_LANES.index(output) for output in range(8))


def _refuse(format: Format, shape: Shape) -> str | None:
    reason = refuse_affine(format, (4,))
    if reason is None and shape[0] % 8:
        reason = f"packs eight outputs in a word; there are {shape[0]}"
    return reason


def _words(codes: Tensor) -> Tensor:
    """uint8 (rows, N) -> int32 (rows, N / 8)."""
    lanes = codes.reshape(codes.shape[0], -1, 8)[..., list(_LANES)]
    return pack_words(lanes.reshape(codes.shape), 4)


def _codes(words: Tensor, outputs: int) -> Tensor:
    """Inverse of :func:`_words`."""
    lanes = unpack_words(words, 4, outputs).reshape(words.shape[0], -1, 8)
    return lanes[..., list(_WHERE)].reshape(words.shape[0], outputs)


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    return _words(codes.T.contiguous()), {
        "qzeros": _words(zeros(format, shape, params).T.contiguous()),
        "scales": params["scale"].squeeze(-1).T.contiguous(),
    }


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = shape
    groups = B.count(columns, format.block)
    expect("qweight", packed, (columns, rows // 8))
    zero = _codes(take(stored, "qzeros", (groups, rows // 8)), rows).T
    params = params_of(format, take(stored, "scales", (groups, rows)).T, zero)
    return _codes(packed, rows).T.contiguous(), params


AWQ = Layout("awq", _refuse, _pack, _unpack)
