# SPDX-License-Identifier: Apache-2.0
"""Writes what other packages make of the layer of layer.npz, each in an environment of its own with torch 2.13.0 on the
CPU: ``python tests/golden/make_solvers.py PEER`` writes PEER.npz, PEER being one of

* ``llmcompressor`` (0.14.0.1, compressed-tensors 0.19.0): ``quantize_weight`` of its GPTQ, groups of 32, damping 0.01,
  act-order being ``weight`` (each group keeps its scale);
* ``gptqmodel`` (7.7.0): ``GPTQ.quantize``, the same, act-order being ``desc_act`` with ``static_groups``;
* ``gptqmodel_vptq`` (7.7.0): ``VPTQ.quantize``, damping 0.01: one book of 64 vectors of 4 weights down a column, as it
  is and with a scale and a bias of each row or column; two books of 16; and such two beside a tenth of the columns,
  those of the largest inputs, in vectors of 2 by a book of 8;
* ``quanto`` (optimum-quanto 0.2.7): ``quantize_weight`` to qint8 in rows of 512, to qint4 and qint2 in groups of 32,
  by the scale and shift of its default optimizers, rounded to float16;
* ``torchao`` (0.18.0): ``IntxWeightOnlyConfig``, scales of float16: 8 bits a row and 4 in groups of 32, symmetric,
  and 3 bits in groups of 32 with a zero point.

``{case}.codes`` uint8 from 0 on and ``{case}.scale`` float32 (rows, groups), with a zero point ``{case}.zero``; or
``{case}.values`` float32.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

HERE, GROUP = Path(__file__).parent, 32
Arrays = dict[str, torch.Tensor]


def codes_of(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float) -> torch.Tensor:
    """Codes of ``values`` (rows, columns) under ``scale`` (rows, groups)."""
    units = values.reshape(len(values), scale.shape[1], -1) / scale.unsqueeze(-1)
    codes = units + (zero.unsqueeze(-1) if isinstance(zero, torch.Tensor) else zero)
    assert float((codes - codes.round()).abs().max()) < 1e-3
    return codes.round().reshape(values.shape).to(torch.uint8)


def llmcompressor(layer: Arrays) -> Arrays:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    found: Arrays = {}
    moment = 2 * layer["inputs"].T @ layer["inputs"]
    for name, bits in (("sym4", 4), ("asym3", 3)):
        groups = layer[name].reshape(len(layer[name]), -1, GROUP)
        for order in (None, "weight"):
            args = QuantizationArgs(num_bits=bits, symmetric=name[0] == "s", group_size=GROUP, actorder=order)
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            weight = layer[name][None].clone()
            values, _, fallback = quantize_weight(weight, moment[None].clone(), scale[None], zero[None], None, args)
            assert not fallback.any()
            case, middle = f"{name}.{'act' if order else 'natural'}", zero.float().round() + 2 ** (bits - 1)
            found |= {f"{case}.codes": codes_of(values[0], scale, middle), f"{case}.scale": scale}
            found[f"{case}.zero"] = middle
    return found


def gptqmodel(layer: Arrays) -> Arrays:
    from gptqmodel.quantization import GPTQ, QuantizeConfig

    found: Arrays = {}
    for name, bits in (("sym4", 4), ("asym3", 3)):
        for ordered in (False, True):
            options = {"desc_act": ordered, "static_groups": True, "act_group_aware": False, "damp_percent": 0.01}
            config = QuantizeConfig(bits=bits, group_size=GROUP, sym=name[0] == "s", **options)
            linear = torch.nn.Linear(*reversed(layer[name].shape), bias=False)
            linear.weight.data = layer[name].clone()
            solver = GPTQ(linear, config)
            solver.quantizer.configure(perchannel=True)
            solver.add_batch(layer["inputs"][None], None)
            values, scale, zero, *_ = solver.quantize()
            case = f"{name}.{'act' if ordered else 'natural'}"
            found |= {f"{case}.codes": codes_of(values, scale, zero), f"{case}.scale": scale, f"{case}.zero": zero}
    return found


def gptqmodel_vptq(layer: Arrays) -> Arrays:
    from gptqmodel.quantization.config import VPTQConfig
    from gptqmodel.quantization.vptq import VPTQ

    one = {"vector_lens": [-1, 4], "num_centroids": [-1, 64], "num_res_centroids": [-1, -1]}
    two = {"vector_lens": [-1, 4], "num_centroids": [-1, 16], "num_res_centroids": [-1, 16]}
    both = {"vector_lens": [2, 4], "num_centroids": [8, 16], "num_res_centroids": [-1, 16], "npercent": 10}
    cases = {
        "vector4x6": one,
        "vector4x6.rows": {**one, "enable_norm": True, "norm_dim": 1},
        "vector4x6.columns": {**one, "enable_norm": True, "norm_dim": 0},
        "vector4x4+4": two,
        "vector4x4+4.outliers": {**both, "enable_perm": True},
    }
    found: Arrays = {}
    for name, options in cases.items():
        linear = torch.nn.Linear(*reversed(layer["sym4"].shape), bias=False)
        linear.weight.data = layer["sym4"].clone()
        solver = VPTQ(linear, VPTQConfig(fallback=None, **options))
        solver.add_batch(layer["inputs"])
        result, *_ = solver.quantize()
        found[f"{name}.values"] = result.quantized_weight
    return found


def quanto(layer: Arrays) -> Arrays:
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight

    weight, found = layer["sym4"], {}
    long = weight.reshape(-1, 512)
    scale = AbsmaxOptimizer()(long, qint8, 0).half().float()
    found["qint8.values"] = quantize_weight(long, qint8, 0, scale, optimized=False).dequantize()
    for kind in (qint4, qint2):
        scale, shift = (part.half().float() for part in MaxOptimizer()(weight, kind, 0, GROUP))
        made = quantize_weight(weight, kind, 0, scale, shift, GROUP, optimized=False)
        codes = (made.dequantize().reshape(-1, GROUP) + shift.reshape(-1, 1)) / scale.reshape(-1, 1)
        found[f"{kind.name}.codes"] = codes.round().reshape(weight.shape).to(torch.uint8)
        found[f"{kind.name}.scale"] = scale.reshape(len(weight), -1)
        found[f"{kind.name}.minimum"] = -shift.reshape(len(weight), -1)
    return found


def torchao(layer: Arrays) -> Arrays:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_

    found: Arrays = {}
    cases = (
        ("int8", PerAxis(0), "SYMMETRIC"),
        ("int4", PerGroup(32), "SYMMETRIC"),
        ("int3", PerGroup(32), "ASYMMETRIC"),
    )
    for kind, granularity, mapping in cases:
        weight = layer["asym3" if mapping == "ASYMMETRIC" else "sym4"]
        model = torch.nn.Sequential(torch.nn.Linear(*reversed(weight.shape), bias=False))
        model[0].weight.data = weight.clone()
        dtype = getattr(torch, kind)
        quantize_(model, IntxWeightOnlyConfig(dtype, granularity, getattr(MappingType, mapping), torch.float16))
        made, middle = model[0].weight, 2 ** (int(kind[3:]) - 1)
        scale, zero = (part.reshape(len(weight), -1).float() for part in (made.scale, made.zero_point))
        case = f"{kind}.{mapping.lower()}"
        found |= {f"{case}.codes": (made.qdata.short() + middle).to(torch.uint8), f"{case}.scale": scale}
        found[f"{case}.zero"] = zero + middle
    return found


PEERS: dict[str, Callable[[Arrays], Arrays]] = {
    one.__name__: one for one in (llmcompressor, gptqmodel, gptqmodel_vptq, quanto, torchao)
}


def main() -> None:
    torch.set_num_threads(1)
    with np.load(HERE / "layer.npz", allow_pickle=False) as data:
        layer = {name: torch.from_numpy(data[name]).float() for name in data.files}
    with torch.no_grad():
        found = PEERS[sys.argv[1]](layer)
    arrays = {
        name: array.numpy() if array.dtype == torch.uint8 else array.float().numpy() for name, array in found.items()
    }
    np.savez_compressed(HERE / f"{sys.argv[1]}.npz", **arrays)


if __name__ == "__main__":
    main()
