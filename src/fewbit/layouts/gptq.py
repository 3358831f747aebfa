# SPDX-License-Identifier: Apache-2.0
"""The tensors of GPTQ checkpoints (AutoGPTQ, GPTQModel; ``quant_method: gptq``), for K inputs and N outputs.

::

    packed  qweight (K bits / 32, N) int32            bit stream along K: word w of column n begins at bit 32 w
            qzeros  (groups, N bits / 32) int32       bit stream along N of the zero points, see below
            scales  (groups, N) float16
            g_idx   (K,) int32                        group of each input

``gptq`` (``checkpoint_format: gptq``, "v1") stores each zero point minus one modulo 2^bits; ``gptq_v2`` stores it as it
is. Readers of v1 that do not reduce modulo 2^bits misread a zero point of 0: prefer v2, or symmetric, where it matters.
Groups are consecutive columns; a ``g_idx`` of another order (act-order without static groups) is refused.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.errors import InputError
from fewbit.layouts.arrays import expect, take
from fewbit.layouts.words import pack_words, params_of, refuse_affine, row_words, unpack_words, zeros


def _refuse(format: Format, shape: Shape) -> str | None:
    reason = refuse_affine(format, (2, 3, 4, 8))
    if reason is None and (shape[1] * format.bits % 32 or shape[0] * format.bits % 32):
        reason = f"packs rows and columns into whole 32-bit words; {shape} at {format.bits} bits leaves a part of one"
    return reason


def _group_index(format: Format, columns: int) -> Tensor:
    return torch.arange(columns, dtype=torch.int32) // B.width(columns, format.block)


def _pack(less: int, format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    top = format.levels - 1
    return pack_words(codes, format.bits).T.contiguous(), {
        "qzeros": pack_words((zeros(format, shape, params) - less).T & top, format.bits),
        "scales": params["scale"].squeeze(-1).T.contiguous(),
        "g_idx": _group_index(format, shape[1]),
    }


def _unpack(
    less: int, format: Format, shape: Shape, packed: Tensor, stored: Params
) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = shape
    order = stored.get("g_idx")
    if order is not None and not torch.equal(order.to(torch.int32), _group_index(format, columns)):
        raise InputError(
            "GPTQ groups of consecutive columns", "g_idx has them in another order", "act-order with static groups"
        )
    groups = B.count(columns, format.block)
    words = take(stored, "qzeros", (groups, row_words(rows, format.bits)))
    zero = (unpack_words(words, format.bits, rows).T + less) & (format.levels - 1)
    expect("qweight", packed, (row_words(columns, format.bits), rows))
    codes = unpack_words(packed.T, format.bits, columns)
    return codes, params_of(format, take(stored, "scales", (groups, rows)).T, zero)


GPTQ = Layout("gptq", _refuse, partial(_pack, 1), partial(_unpack, 1))
GPTQ_V2 = Layout("gptq_v2", _refuse, partial(_pack, 0), partial(_unpack, 0))
