# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's CPU matrix product: a graph of one ``ggml_mul_mat``, through ctypes.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python

builds it for this processor. Weights lie where llama.cpp itself would put them: in CPU_REPACK buffers, which interleave
rows, if these take the type on this machine. 64 rows are quantized and repeated: speed does not depend on values.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import weakref
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peers.row import SAMPLE, Prepared, Problem, Row, Unavailable, rotated

HOW = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python'
FLOAT32 = 0
DESCRIPTORS = 1 << 20
"""Bytes for the descriptors of a few tensors and of a graph."""

TYPES: dict[str, tuple[int, int, str]] = {
    "F16": (1, 16, "float16"),
    "BF16": (30, 16, "bfloat16"),
    "Q8_0": (8, 8, "int8/g32"),
    "Q6_K": (14, 6, "int8/g256"),
    "Q5_0": (6, 5, "int8/g32"),
    "Q5_K": (13, 5, "int8/g256"),
    "Q4_0": (2, 4, "int8/g32"),
    "Q4_K": (12, 4, "int8/g256"),
    "IQ4_NL": (20, 4, "int8/g32"),
    "IQ4_XS": (23, 4, "int8/g256"),
    "Q3_K": (11, 3, "int8/g256"),
    "IQ3_S": (21, 3, "int8/g256"),
    "Q2_K": (10, 2, "int8/g256"),
    "IQ2_S": (22, 2, "int8/g256"),
    "TQ2_0": (35, 2, "int8/g256"),
    "TQ1_0": (34, 2, "int8/g256"),
    "Q1_0": (41, 1, "int8/g32"),
}
"""Name -> number in ggml.h, bits of a code (2 where ternary), what activations are rounded to."""

Pointer = c_void_p
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_free": (None, (Pointer,)),
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_new_tensor_2d": (Pointer, (Pointer, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (Pointer, (Pointer, Pointer, Pointer)),
    "ggml_new_graph": (Pointer, (Pointer,)),
    "ggml_build_forward_expand": (None, (Pointer, Pointer)),
    "ggml_quantize_chunk": (c_size_t, (c_int, Pointer, Pointer, c_int64, c_int64, c_int64, Pointer)),
    "ggml_backend_cpu_init": (Pointer, ()),
    "ggml_backend_cpu_set_n_threads": (None, (Pointer, c_int)),
    "ggml_backend_cpu_reg": (Pointer, ()),
    "ggml_backend_cpu_buffer_type": (Pointer, ()),
    "ggml_backend_get_device": (Pointer, (Pointer,)),
    "ggml_backend_reg_get_proc_address": (Pointer, (Pointer, c_char_p)),
    "ggml_backend_buft_name": (c_char_p, (Pointer,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, (Pointer, Pointer)),
    "ggml_backend_buffer_free": (None, (Pointer,)),
    "ggml_backend_tensor_set": (None, (Pointer, Pointer, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (Pointer, Pointer, c_size_t, c_size_t)),
    "ggml_backend_supports_op": (c_bool, (Pointer, Pointer)),
    "ggml_backend_graph_compute": (c_int, (Pointer, Pointer)),
}


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, Pointer)


class InitParams(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


class TypeTraits(ctypes.Structure):
    """The beginning of ``ggml_type_traits``."""

    _fields_ = (
        ("name", c_char_p),
        ("block", c_int64),
        ("interleaved", c_int64),
        ("size", c_size_t),
        ("quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


@functools.cache
def load(folder: Path | None) -> ctypes.CDLL:
    """ggml's CPU backend with its signatures, from ``folder`` or from the package llama-cpp-python.

    Raises:
        Unavailable: it is not there.
    """
    if folder is None:
        package = importlib.util.find_spec("llama_cpp")
        if package is None or package.origin is None:
            raise Unavailable(f"llama-cpp-python is not installed; {HOW}")
        folder = Path(package.origin).parent / "lib"
    files = sorted(folder.rglob("libggml-cpu.*"))
    if not files:
        raise Unavailable(f"no libggml-cpu in {folder}; {HOW}")
    library = ctypes.CDLL(str(files[0]))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_init.restype, library.ggml_init.argtypes = Pointer, (InitParams,)
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    library.quiet = LOG(lambda *_: None)  # it would tell of every weight that it interleaves
    library.ggml_log_set(library.quiet, None)
    return library


@functools.cache
def backend(folder: Path | None, threads: int) -> int:
    library = load(folder)
    made: int = library.ggml_backend_cpu_init()
    library.ggml_backend_cpu_set_n_threads(made, threads)
    return made


def buffer_types(library: ctypes.CDLL, cpu: int) -> list[int]:
    """Where a weight can lie, best first: buffers that interleave rows, then plain memory."""
    address = library.ggml_backend_reg_get_proc_address(
        library.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
    )
    extra: list[int] = []
    if address:
        ask = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
        for found in ask(library.ggml_backend_get_device(cpu)):
            if not found:
                break
            extra.append(found)
    return [*extra, library.ggml_backend_cpu_buffer_type()]


class Product:
    """One weight in ggml's memory, and the graph of its product with x; all freed with this object."""

    def __init__(
        self, library: ctypes.CDLL, cpu: int, where: int, kind: int, shape: tuple[int, int], x: Tensor
    ) -> None:
        self.library, self.cpu, self.x = library, cpu, x.contiguous()
        rows, columns = shape
        tokens = x.shape[0]
        weights, work = (library.ggml_init(InitParams(DESCRIPTORS, None, True)) for _ in range(2))
        self.weight = library.ggml_new_tensor_2d(weights, kind, columns, rows)
        buffers = [library.ggml_backend_alloc_ctx_tensors_from_buft(weights, where)]
        self.input = library.ggml_new_tensor_2d(work, FLOAT32, columns, tokens)
        self.output = library.ggml_mul_mat(work, self.weight, self.input)
        self.graph = library.ggml_new_graph(work)
        library.ggml_build_forward_expand(self.graph, self.output)
        buffers.append(library.ggml_backend_alloc_ctx_tensors_from_buft(work, library.ggml_backend_cpu_buffer_type()))
        weakref.finalize(self, _free, library, buffers, [weights, work])
        self.supported = bool(library.ggml_backend_supports_op(cpu, self.output))

    def fill(self, packed: Tensor) -> None:
        """``packed``: the weight in ggml's own row-major layout, as bytes."""
        self.library.ggml_backend_tensor_set(self.weight, packed.data_ptr(), 0, packed.numel())
        self.library.ggml_backend_tensor_set(self.input, self.x.data_ptr(), 0, self.x.numel() * 4)

    def __call__(self) -> None:
        status = self.library.ggml_backend_graph_compute(self.cpu, self.graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def result(self, rows: int) -> Tensor:
        """y (tokens, rows)."""
        y = torch.empty(self.x.shape[0], rows)
        self.library.ggml_backend_tensor_get(self.output, y.data_ptr(), 0, y.numel() * 4)
        return y


def _free(library: ctypes.CDLL, buffers: list[int], contexts: list[int]) -> None:
    for buffer in buffers:
        library.ggml_backend_buffer_free(buffer)
    for context in contexts:
        library.ggml_free(context)


def prepare(name: str, folder: Path | None, problem: Problem) -> Prepared:
    library, cpu = load(folder), backend(folder, problem.threads)
    kind = TYPES[name][0]
    rows, columns = problem.shape
    if (library.ggml_type_name(kind) or b"").decode().upper() != name:
        raise Unavailable("this version of ggml has no such type; a newer llama-cpp-python does")
    if columns % library.ggml_blck_size(kind):
        raise Unavailable(f"{columns} columns are no multiple of its block of {library.ggml_blck_size(kind)}")
    sample, size = problem.weight[:SAMPLE].contiguous(), library.ggml_row_size(kind, columns)
    packed = torch.empty(len(sample) * size, dtype=torch.uint8)
    library.ggml_quantize_chunk(kind, sample.data_ptr(), packed.data_ptr(), 0, len(sample), columns, None)
    held = torch.empty_like(sample)
    library.ggml_get_type_traits(kind).contents.to_float(packed.data_ptr(), held.data_ptr(), held.numel())
    whole = packed.repeat(-(-rows // len(sample)))[: rows * size]
    for where in buffer_types(library, cpu):
        if Product(library, cpu, where, kind, problem.shape, problem.x).supported:
            break
    else:
        raise Unavailable("ggml's CPU backend does not multiply by this type")

    def product() -> Product:
        made = Product(library, cpu, where, kind, problem.shape, problem.x)
        made.fill(whole)
        return made

    calls = rotated(problem, whole.numel(), product)
    first = calls[0]
    first()
    assert isinstance(first, Product)
    return Prepared(library.ggml_backend_buft_name(where).decode(), whole.numel(), calls, first.result(rows), held)


def rows(folder: Path | None = None) -> list[Row]:
    """A row a type; ``folder`` holds libggml-cpu where it is not that of llama-cpp-python."""
    return [
        Row("llama.cpp", name, codes, activations, functools.partial(prepare, name, folder))
        for name, (_, codes, activations) in TYPES.items()
    ]
