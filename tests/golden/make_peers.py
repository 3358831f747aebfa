# SPDX-License-Identifier: Apache-2.0
"""Writes peers.npz with bitsandbytes 0.50.2, hqq 0.2.8, kmeans1d 0.5.0, coremltools 9.0 and torch 2.13.0, in an
environment of their own, on the CPU: ``python tests/golden/make_peers.py``.

* ``nf4.*``, ``fp4.*``: ``bitsandbytes.functional.quantize_4bit`` of a (36, 512) weight in blocks of 64, scales
  quantized too: ``codes`` (a byte each), ``scale_code``, ``super_scale``, ``scale_mean``; ``values``, what
  ``dequantize_4bit`` says; ``map``: its dynamic map; ``table``: what its codes stand for.
* ``hqq{bits}.*``: ``hqq.core.quantize.Quantizer.quantize`` of an (8, 256) weight in groups of 64 along the inputs:
  ``values``, what ``dequantize`` says.
* ``kmeans{count}.*``: ``kmeans1d.cluster`` of 600 numbers: ``centers``.
* ``lut.*``: ``KMeans._quantize_centroids`` of coremltools (int8) of 16 numbers: ``entries``, decoded, and ``scale``.
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional
from coremltools.optimize.torch._utils.k_means import KMeans
from hqq.core.quantize import Quantizer
from kmeans1d import cluster


def bitsandbytes(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=kind)
    packed = packed.flatten()
    return {
        "weight": weight.half(),
        "codes": torch.stack([packed >> 4, packed & 15], 1).reshape(weight.shape),
        "scale_code": state.absmax.reshape(len(weight), -1),
        "super_scale": state.state2.absmax,
        "scale_mean": state.offset,
        "map": state.state2.code,
        "table": state.code,
        "values": functional.dequantize_4bit(packed.reshape(-1, 1), state),
    }


def hqq(weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    found = Quantizer.quantize(
        weight, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32, bitpack=False
    )
    return {"weight": weight.half(), "values": Quantizer.dequantize(*found).reshape(weight.shape)}


def main() -> None:
    generator = torch.Generator().manual_seed(20)
    normal = lambda *shape: torch.randn(*shape, generator=generator).half().float()  # noqa: E731
    weight = normal(36, 512) * torch.logspace(-2, 0, 36)[:, None].half().float()
    groups = {kind: bitsandbytes(weight.half().float(), kind) for kind in ("nf4", "fp4")}
    for bits in (4, 2):
        groups[f"hqq{bits}"] = hqq((normal(8, 256) ** 3).half().float(), bits)
    points = normal(600)
    for count in (4, 8, 16):
        centers = torch.tensor(cluster(points.tolist(), count).centroids, dtype=torch.float64)
        groups[f"kmeans{count}"] = {"points": points.half(), "centers": centers}
    decoded, scale, _ = KMeans._quantize_centroids(torch.int8, groups["kmeans16"]["centers"].reshape(-1, 1))
    groups["lut"] = {"entries": decoded.flatten(), "scale": scale.flatten()}
    arrays = {f"{name}.{key}": value.numpy() for name, group in groups.items() for key, value in group.items()}
    np.savez_compressed(Path(__file__).parent / "peers.npz", **arrays)


if __name__ == "__main__":
    main()
