# SPDX-License-Identifier: Apache-2.0
"""Writes compressed_tensors.npz with compressed-tensors 0.20.0 and torch 2.13.0, in an environment of their own:
``python tests/golden/make_compressed_tensors.py``.

For each case ``{bits}.{sym|asym}``: the tensors that ``PackedQuantizationCompressor.compress`` stores for an (11, 96)
weight in groups of 32, and ``weight``, what its ``decompress`` makes of them in float32.
"""

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

ROWS, COLUMNS, GROUP = 11, 96, 32


def main() -> None:
    generator = torch.Generator().manual_seed(20)
    arrays = {}
    for bits in range(2, 9):
        for symmetric in (True, False):
            args = QuantizationArgs(num_bits=bits, strategy="group", group_size=GROUP, symmetric=symmetric)
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            weight = torch.randn(ROWS, COLUMNS, generator=generator)
            half = 2 ** (bits - 1)
            scale = (weight.reshape(ROWS, -1, GROUP).abs().amax(-1) / half).half().float()
            zero = torch.zeros_like(scale, dtype=torch.int8)
            if not symmetric:
                zero = torch.randint(-half, half, zero.shape, generator=generator).to(torch.int8)
            state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
            stored = PackedQuantizationCompressor.compress(state, scheme)
            stored["weight"] = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
            for name, tensor in stored.items():
                arrays[f"{bits}.{'sym' if symmetric else 'asym'}.{name}"] = tensor.numpy()
    np.savez_compressed(Path(__file__).parent / "compressed_tensors.npz", **arrays)


if __name__ == "__main__":
    main()
