# SPDX-License-Identifier: Apache-2.0
"""Writes imatrix.npz with ggml 0.25.3 (of llama-cpp-python 0.3.36) and gguf 0.19.0:
``python tests/golden/make_imatrix.py libggml-base.so``.

``weight`` (4, 512) float16 and ``mean_square`` (512,) float32, and for each type ``{type}.values`` and ``{type}.plain``
(4, 512) float32: what ``gguf.quants.dequantize`` makes of the bytes that ``ggml_quantize_chunk`` writes with that
importance matrix, and without one.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants

ROWS, COLUMNS = 4, 512
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1")


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def quantize(library: ctypes.CDLL, kind: T, weight: np.ndarray, worth: np.ndarray | None) -> np.ndarray:
    """What the bytes that ggml writes stand for."""
    packed = np.zeros((ROWS, quants.quant_shape_to_byte_shape((COLUMNS,), kind)[0]), dtype=np.uint8)
    size = [ctypes.c_int64(number) for number in (0, ROWS, COLUMNS)]
    library.ggml_quantize_chunk(ctypes.c_int(kind), pointer(weight), pointer(packed), *size, pointer(worth))
    return quants.dequantize(packed, kind)


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    generator = np.random.default_rng(20)
    weight = generator.standard_t(5, (ROWS, COLUMNS)).astype(np.float16).astype(np.float32)
    worth = np.exp(generator.normal(0, 1.5, COLUMNS)).astype(np.float32)
    arrays = {"weight": weight.astype(np.float16), "mean_square": worth}
    for name in TYPES:
        arrays[f"{name.lower()}.values"] = quantize(library, T[name], weight, worth)
        arrays[f"{name.lower()}.plain"] = quantize(library, T[name], weight, None)
    np.savez_compressed(Path(__file__).parent / "imatrix.npz", **arrays)


if __name__ == "__main__":
    main()
