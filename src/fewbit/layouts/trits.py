# SPDX-License-Identifier: Apache-2.0
"""Base 3: five codes of at most three levels in a byte (3^5 = 243 of 256), 1.6 bits a weight.

::

    byte k of a row = c[5k] + 3 c[5k+1] + 9 c[5k+2] + 27 c[5k+3] + 81 c[5k+4]     (0 beyond the last column)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.errors import InputError
from fewbit.layouts.arrays import expect
from fewbit.layouts.dense import load_params, store_params

_POWERS = (1, 3, 9, 27, 81)


def _refuse(format: Format, shape: Shape) -> str | None:
    return None if format.levels <= 3 else f"packs codes of at most 3 levels; {format.name} has {format.levels}"


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = codes.shape
    fives = torch.nn.functional.pad(codes, (0, -columns % 5)).reshape(rows, -1, 5)
    packed = fives[..., 0].clone()
    for digit in range(1, 5):
        packed += fives[..., digit] * _POWERS[digit]
    return packed, store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = shape[0], shape[1] // format.dim
    expect("base-3 codes", packed, (rows, -(-columns // 5)))
    if packed.numel() and int(packed.max()) >= 243:
        raise InputError("base-3 codes", f"found a byte of {int(packed.max())}", "five base-3 digits are at most 242")
    codes = torch.empty(rows, packed.shape[1], 5, dtype=torch.uint8, device=packed.device)
    for digit, power in enumerate(_POWERS):
        codes[..., digit] = packed // power % 3
    return codes.reshape(rows, -1)[:, :columns].contiguous(), load_params(format, shape, stored)


TRITS = Layout("trits", _refuse, _pack, _unpack)
