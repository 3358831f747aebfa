# SPDX-License-Identifier: Apache-2.0
"""What torch itself has: ``linear`` in float32 and bfloat16, its weight-only operators of 4 and 8 bits, and dynamic
int8 through fbgemm and oneDNN.

Dynamic int8 gives activations one scale for all tokens; without VNNI they get 7 bits (``reduce_range``), as products
of bytes would saturate otherwise.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.nn.functional import linear

from peers.row import SAMPLE, Call, Prepared, Problem, Row, Unavailable, rotated, round_affine

GROUP = 128
ENGINES = ("fbgemm", "onednn")


def plain(dtype: torch.dtype, problem: Problem) -> Prepared:
    """x and the weight are rounded to ``dtype`` beforehand, y is in it."""
    weight, x = problem.weight.to(dtype), problem.x.to(dtype)

    def copy() -> Call:
        mine: Tensor = weight.clone()
        return lambda: linear(x, mine)

    return Prepared("linear", weight.nbytes, rotated(problem, weight.nbytes, copy), linear(x, weight), weight[:SAMPLE])


def int4pack(problem: Problem) -> Prepared:
    columns = problem.shape[1]
    if columns % GROUP:
        raise Unavailable(f"{columns} columns are no multiple of its group of {GROUP}")
    codes, scale = round_affine(problem.weight, 4, GROUP)
    x, scale = problem.x.bfloat16(), scale.bfloat16()
    pairs = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except RuntimeError as error:
        raise Unavailable(f"torch refuses: {str(error).splitlines()[0]}") from error

    def copy() -> Call:
        mine, its_scales = packed.clone(), pairs.clone()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, mine, GROUP, its_scales)

    held = (codes[:SAMPLE].float() - 8).reshape(-1, columns // GROUP, GROUP) * scale[:SAMPLE, :, None].float()
    nbytes = packed.nbytes + pairs.nbytes
    calls = rotated(problem, nbytes, copy)
    return Prepared("_weight_int4pack_mm", nbytes, calls, calls[0](), held.reshape(-1, columns))  # type: ignore[arg-type]


def int8pack(problem: Problem) -> Prepared:
    codes, scale = round_affine(problem.weight, 8, problem.shape[1])
    codes, scale, x = (codes.int() - 128).to(torch.int8), scale[:, 0].bfloat16(), problem.x.bfloat16()

    def copy() -> Call:
        mine, its_scales = codes.clone(), scale.clone()
        return lambda: torch.ops.aten._weight_int8pack_mm(x, mine, its_scales)

    nbytes = codes.nbytes + scale.nbytes
    calls = rotated(problem, nbytes, copy)
    held = codes[:SAMPLE].float() * scale[:SAMPLE, None].float()
    return Prepared("_weight_int8pack_mm", nbytes, calls, calls[0](), held)  # type: ignore[arg-type]


def dynamic(engine: str, problem: Problem) -> Prepared:
    """``quantized::linear_dynamic`` of an int8 weight with a scale a row."""
    if engine not in torch.backends.quantized.supported_engines:
        raise Unavailable(f"this torch was built without {engine}")
    narrow = not torch.cpu._is_vnni_supported()
    scale = (problem.weight.abs().amax(1) / 127).double()
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these operators are deprecated, and still torch's fastest of int8
        codes = torch.quantize_per_channel(problem.weight, scale, torch.zeros(len(scale)).long(), 0, torch.qint8)

    def copy() -> Call:
        mine = torch.ops.quantized.linear_prepack(codes.clone(), None)
        return lambda: torch.ops.quantized.linear_dynamic(problem.x, mine, narrow)

    nbytes = codes.numel() + 4 * len(scale)
    calls = rotated(problem, nbytes, copy)
    return Prepared(f"linear_dynamic {engine}", nbytes, calls, calls[0](), codes[:SAMPLE].dequantize())  # type: ignore[arg-type]


def rows() -> list[Row]:
    bits = 8 if torch.cpu._is_vnni_supported() else 7
    return [
        Row("torch", "float32", 32, "float32", functools.partial(plain, torch.float32)),
        Row("torch", "bfloat16", 16, "bfloat16", functools.partial(plain, torch.bfloat16)),
        Row("torch", "int8/channel", 8, "bfloat16", int8pack),
        Row("torch", "int4/g128", 4, "bfloat16", int4pack),
        *(
            Row("torch", f"int8/channel {engine}", 8, f"int{bits}/tensor", functools.partial(dynamic, engine))
            for engine in ENGINES
        ),
    ]
