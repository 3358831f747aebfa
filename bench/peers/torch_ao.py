# SPDX-License-Identifier: Apache-2.0
"""torchao's ``quantize_`` on one ``nn.Linear``, run eagerly.

    pip install torchao

What it has no CPU kernel for either raises, and is listed with what it said, or decodes the weight in every call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
from typing import Any

import torch

from peers.row import SAMPLE, Prepared, Problem, Row, Unavailable, rotated

KINDS: dict[str, tuple[int, str, str, torch.dtype, dict[str, Any]]] = {
    "int8 weight-only": (8, "float32", "Int8WeightOnlyConfig", torch.float32, {}),
    "int8 dynamic": (8, "int8/channel", "Int8DynamicActivationInt8WeightConfig", torch.float32, {}),
    "int4 weight-only g128": (4, "bfloat16", "Int4WeightOnlyConfig", torch.bfloat16, {"group_size": 128}),
    "int4 weight-only g128 tiled": (
        4,
        "bfloat16",
        "Int4WeightOnlyConfig",
        torch.bfloat16,
        {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"},
    ),
}
"""Name -> bits of a code, what activations are, the configuration's class, the layer's dtype, its arguments."""


def quantization() -> Any:
    """The module. Its libraries for GPUs fail to load here, and it says so each time: of no interest."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import torchao.quantization as module
    except ImportError as error:
        raise Unavailable(f"{error.name or error} is not installed; pip install torchao") from error
    return module


def prepare(name: str, problem: Problem) -> Prepared:
    module = quantization()
    _, _, config, dtype, arguments = KINDS[name]
    rows, columns = problem.shape
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=dtype)
    layer.weight = torch.nn.Parameter(problem.weight.to(dtype), requires_grad=False)
    x = problem.x.to(dtype)
    try:
        module.quantize_(layer, getattr(module, config)(**arguments))
        y = layer(x)
    except Exception as error:  # whatever stands in the way differs from kind to kind
        reason = str(error).strip().splitlines()[0]
        raise Unavailable(f"no kernel of it runs on this CPU ({type(error).__name__}: {reason})") from error
    weight: Any = layer.weight
    if not hasattr(weight, "tensor_data_names"):
        raise Unavailable(f"it leaves a layer of {rows} x {columns} as it is")
    nbytes = sum(getattr(weight, part).nbytes for part in weight.tensor_data_names)
    calls = rotated(problem, nbytes, lambda: functools.partial(copy.deepcopy(layer), x))
    return Prepared(type(weight).__name__, nbytes, calls, y, weight.dequantize()[:SAMPLE])


def rows() -> list[Row]:
    return [
        Row("torchao", name, codes, activations, functools.partial(prepare, name))
        for name, (codes, activations, *_) in KINDS.items()
    ]
