# SPDX-License-Identifier: Apache-2.0
"""The tensors of compressed-tensors' ``pack-quantized`` (llm-compressor, vLLM), for N outputs and K inputs.

::

    packed  weight_packed      (N, ceil(K bits / 32)) int32        bit stream along K
            weight_scale       (N, groups) float16
            weight_zero_point  (ceil(N bits / 32), groups) int32   bit stream along N, asymmetric only
            weight_shape       (2,) int64                          N, K

That tool counts codes and zero points from -2^(bits-1); both are stored with 2^(bits-1) added, which makes them ours.
Fields of 3, 5, 6 and 7 bits straddle words, as in version 0.20 of the tool; older versions packed those differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.formats.affine import Affine
from fewbit.layouts.arrays import expect, take
from fewbit.layouts.words import pack_words, params_of, refuse_affine, row_words, unpack_words, zeros


def _refuse(format: Format, shape: Shape) -> str | None:
    return refuse_affine(format, tuple(range(1, 9)))


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    stored = {"weight_scale": params["scale"].squeeze(-1).contiguous(), "weight_shape": torch.tensor(shape)}
    if "zero_point" in params:  # asymmetric
        stored["weight_zero_point"] = pack_words(zeros(format, shape, params).T, format.bits).T.contiguous()
    return pack_words(codes, format.bits), stored


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = shape
    assert isinstance(format, Affine)
    groups = B.count(columns, format.block)
    if format.symmetric:
        zero = zeros(format, shape, {})
    else:
        words = take(stored, "weight_zero_point", (row_words(rows, format.bits), groups))
        zero = unpack_words(words.T, format.bits, rows).T
    expect("weight_packed", packed, (rows, row_words(columns, format.bits)))
    scale = take(stored, "weight_scale", (rows, groups))
    return unpack_words(packed, format.bits, columns), params_of(format, scale, zero)


COMPRESSED_TENSORS = Layout("compressed-tensors", _refuse, _pack, _unpack)
