# SPDX-License-Identifier: Apache-2.0
"""The compiled core, or the reason why it is absent. Pointers in, nothing out: sizes are checked by the callers."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from fewbit.core import compiled
from fewbit.errors import SpecError, UnsupportedError

if TYPE_CHECKING:
    import torch

    DTYPES: dict[torch.dtype, int]
    """Of activations and results."""

Isa = Literal[
    "avx512vpopcnt",
    "avx512vbmi",
    "avx512vnni",
    "avx512bf16",
    "avx512",
    "avxvnni",
    "avx2",
    "neoni8mm",
    "neondot",
    "neon",
    "serial",
]

FLAGS: dict[Isa, int] = {
    "avx512vpopcnt": 64,
    "avx512vbmi": 128,
    "avx512vnni": 8,
    "avx512bf16": 256,
    "avx512": 4,
    "avxvnni": 512,
    "avx2": 2,
    "neoni8mm": 1024,
    "neondot": 32,
    "neon": 16,
    "serial": 1,
}
"""Bits of ``fewbit_caps()``, best first."""
FAMILIES = {"affine": 0, "lut": 1}
SIGNS = -1
"""``x_block`` of ``linear_many`` where activations are rounded to signs."""
BFLOAT16S = -2
"""``x_block`` of ``linear_many`` where activations are bfloat16 and multiplied as such."""
INT24 = -3
"""``x_block`` of ``linear_many`` where activations become integers of 24 bits."""

Matrix = tuple[int, int, int, int, int, int, int, float, int, int, int, int, int]
"""(rows, columns, block, bits, family, scale is half, offset is half, zero, codes, scale, offset, table,
arranged)."""

VectorMatrix = tuple[int, ...]
"""(rows, columns, block, height, bits, bits of the residual, books are half, codes, book, residual)."""

RowLevels = tuple[int, ...]
"""(rows, columns, rows of a table, bits, codes, levels, factor, in rowhalves16)."""

RowTables = tuple[int, ...]
"""(rows, columns, block, rows of a table, bits, table is half, codes, table, scale, in rowhalves16)."""

ByteVectorMatrix = tuple[int, ...]
"""(rows, columns, block, height, bits, bits of the residual, codes, book, step, offset)."""

Output = tuple[Matrix, int, int, int]
"""(matrix, bias, y, elements between its tokens)."""

Input = tuple[int, int, int, int, int]
"""(activations, tokens, elements between tokens, elements between columns, dtype)."""

SparseMatrix = tuple[int, int, int, int, int, int, int, int]
"""(rows, columns, bytes of an index, value is half, start, order, index, value)."""

Windows = tuple[int, ...]
"""The 18 members of ``fewbit_windows`` in ``csrc/include/fewbit.h``, in their order."""

Operand = tuple[int, int, int, int, int, float, int, int]
"""The 8 members of ``fewbit_operand`` in ``csrc/include/fewbit_matmul.h``, in their order."""

Draw = tuple[int | float, ...]
"""The 18 members of ``fewbit_draw`` in ``csrc/include/fewbit_sample.h``, in their order."""


class Core(Protocol):
    """The functions of ``fewbit._native``; arguments as in ``csrc/bind*.cc``."""

    def caps(self) -> int: ...
    def set_threads(self, threads: int) -> None: ...
    def tile16_bytes(self, rows: int, columns: int, bits: int) -> int: ...
    def tile16_pack(self, codes: int, stride: int, rows: int, columns: int, bits: int, packed: int) -> None: ...
    def tile16_unpack(self, packed: int, rows: int, columns: int, bits: int, codes: int, stride: int) -> None: ...
    def arrange(self, rows: int, columns: int, bits: int, back: int, packed: int) -> None: ...
    def rowhalves16(self, rows: int, columns: int, back: int, packed: int) -> None: ...
    def decode(
        self, matrix: Matrix, tile_begin: int, tile_end: int, out: int, stride: int, isa: int, threads: int
    ) -> None: ...
    def sparse_add(self, matrix: SparseMatrix, x: Input, y: int, y_stride: int, isa: int, threads: int) -> None: ...
    def vector_linear(
        self, matrix: VectorMatrix, x: Input, bias: int, y: int, y_stride: int, y_dtype: int, isa: int, threads: int
    ) -> None: ...
    def vector_linear_int8(
        self,
        matrix: ByteVectorMatrix,
        x_block: int,
        x: Input,
        bias: int,
        y: int,
        y_stride: int,
        y_dtype: int,
        isa: int,
        threads: int,
    ) -> None: ...
    def vector_decode(
        self, matrix: VectorMatrix, tile_begin: int, tile_end: int, out: int, stride: int, isa: int, threads: int
    ) -> None: ...
    def row_linear(
        self, matrix: RowTables, x: Input, bias: int, y: int, y_stride: int, y_dtype: int, isa: int, threads: int
    ) -> None: ...
    def row_linear_int8(
        self, matrix: RowLevels, x: Input, bias: int, y: int, y_stride: int, y_dtype: int, isa: int, threads: int
    ) -> None: ...
    def row_decode(
        self, matrix: RowTables, row_begin: int, row_end: int, out: int, stride: int, isa: int, threads: int
    ) -> None: ...
    def unfold(self, windows: Windows, x: int, begin: int, end: int, out: int, threads: int) -> None: ...
    def int8_windows(
        self,
        windows: Windows,
        x: int,
        dtype: int,
        images: int,
        groups: int,
        weight: int,
        rows: int,
        bias: int,
        y: int,
        isa: int,
        threads: int,
    ) -> None: ...
    def int8_matmul(
        self,
        a: Operand,
        b: Operand,
        outer: int,
        middle: int,
        rows: int,
        inner: int,
        columns: int,
        y: int,
        isa: int,
        threads: int,
    ) -> None: ...
    def sample(self, draws: tuple[Draw, ...], tokens: int, threads: int) -> None: ...
    def likeliest(self, logits: int, vocabulary: int, count: int, tokens: int) -> float: ...
    def large_pages(self, data: int, nbytes: int) -> None: ...
    def read_stream(self, data: int, nbytes: int, threads: int) -> int: ...
    def linear_many(
        self,
        outputs: tuple[Output, ...],
        x: Input,
        x_block: int,
        y_dtype: int,
        isa: int,
        threads: int,
        scale: float = 0.0,
        zero: int = 0,
    ) -> None: ...
    def fields_unpack(self, packed: int, rows: int, columns: int, bits: int, codes: int, threads: int) -> None: ...
    def rewrite(
        self,
        steps: tuple[tuple[int, int, int, int], ...],
        x: int,
        tokens: int,
        columns: int,
        out: int,
        isa: int,
        threads: int,
    ) -> None: ...
    def weight_multiply(self, weight: int, x: int, tokens: int, y: int, isa: int, threads: int) -> None: ...
    def decoder_new(self, model: int, kv: int, sequences: int) -> int: ...
    def decoder_free(self, decoder: int) -> None: ...
    def decoder_feed(
        self, decoder: int, parts: tuple[tuple[int, int, int], ...], every: bool, logits: int, threads: int
    ) -> None: ...
    def decoder_keep(self, decoder: int, source: int, target: int, length: int) -> None: ...
    def decoder_bytes(self, decoder: int) -> int: ...


def __getattr__(name: str) -> Any:
    """:data:`DTYPES`, for which torch is imported: what only decodes does without."""
    if name != "DTYPES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    globals()[name] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    return globals()[name]


def _load() -> tuple[Core | None, str | None]:
    return cast("tuple[Core | None, str | None]", compiled.load())


def available() -> bool:
    """Whether the compiled kernels can be used."""
    return _load()[0] is not None


def why_not() -> str | None:
    """None when the compiled kernels can be used, else the reason."""
    return _load()[1]


def core() -> Core:
    """The compiled functions.

    Raises:
        UnsupportedError: the package was installed without them.
    """
    module, reason = _load()
    if module is None:
        raise UnsupportedError(
            "a native kernel", reason or "", 'kernel="reference" works; so does reinstalling with a C++ compiler'
        )
    return module


@functools.cache
def capabilities() -> int:
    """Bits of :data:`FLAGS` that this machine can run; 0 without the native module."""
    return core().caps() if available() else 0


def isas() -> tuple[Isa, ...]:
    """Instruction sets that this machine can run and this build contains, best first."""
    return _isas(capabilities())


def lacks(isa: Isa) -> str | None:
    """None, or why nothing can run on ``isa`` here."""
    found = f"this machine or build has no {isa}; it has {', '.join(isas())}"
    return why_not() or (None if isa in isas() else found)


@functools.cache
def _isas(caps: int) -> tuple[Isa, ...]:
    return tuple(isa for isa, flag in FLAGS.items() if caps & flag)


def set_threads(threads: int | None) -> None:
    """Threads of the native kernels, for every later call; None follows ``torch.get_num_threads()`` (the default).

    Raises:
        SpecError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise SpecError(f"{threads} threads", "one at least computes", "1 or more, or None to follow torch")
    if available():
        core().set_threads(threads or 0)


def threads() -> int:
    """As many as torch uses where it is imported, else the cores of this process."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
