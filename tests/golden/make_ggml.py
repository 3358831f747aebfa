# SPDX-License-Identifier: Apache-2.0
"""Writes ggml.npz with the gguf package of llama.cpp (gguf 0.19.0): ``python tests/golden/make_ggml.py``.

For each type: ``{type}.bytes`` (rows, bytes) and ``{type}.values`` (rows, columns) float32, what
``gguf.quants.dequantize`` says those bytes stand for. Where ``gguf.quants.quantize`` exists it wrote the bytes, from a
normal weight; for Q4_K and Q6_K, which that package only reads, every byte is random but the float16 scales, which are
finite.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants

COLUMNS = 512
ROWS = 3


def random_blocks(generator: np.random.Generator, size: int, halves: tuple[int, ...]) -> np.ndarray:
    """(ROWS, bytes) with a float16 of either sign at each offset of ``halves`` in a struct of ``size`` bytes."""
    blocks = generator.integers(0, 256, (ROWS, COLUMNS // 256, size), dtype=np.uint8)
    for offset in halves:
        scale = generator.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., offset : offset + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


def main() -> None:
    generator = np.random.default_rng(20)
    weight = generator.normal(0, 0.05, (ROWS, COLUMNS)).astype(np.float32)
    weight[0, :32] = 0
    weight[1, 32:64] = 0.125
    trits = (generator.integers(-1, 2, (ROWS, COLUMNS)) * np.float32(0.375)).astype(np.float32)
    data = {
        "q8_0": quants.quantize(weight, T.Q8_0),
        "q4_0": quants.quantize(weight, T.Q4_0),
        "q4_1": quants.quantize(weight, T.Q4_1),
        "q4_k": random_blocks(generator, 144, (0, 2)),
        "q6_k": random_blocks(generator, 210, (208,)),
        "tq1_0": quants.quantize(trits, T.TQ1_0),
        "tq2_0": quants.quantize(trits, T.TQ2_0),
    }
    arrays = {}
    for name, block in data.items():
        arrays[f"{name}.bytes"] = block
        arrays[f"{name}.values"] = quants.dequantize(block, T[name.upper()])
    np.savez_compressed(Path(__file__).parent / "ggml.npz", **arrays)


if __name__ == "__main__":
    main()
