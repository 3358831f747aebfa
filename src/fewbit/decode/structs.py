# SPDX-License-Identifier: Apache-2.0
"""The structs of ``csrc/include/fewbit.h`` and ``fewbit_decode.h``, member by member. The core refuses a model whose
size differs from its own."""

from __future__ import annotations

import ctypes as C

ABSENT, TILED, CODEBOOK, DENSE, BYTE_CODEBOOK, ROW_TABLES, ROW_LEVELS, SPARSE, SUM, PRODUCT, COLUMNS, OUTLIERS = range(
    12
)
KV = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}


def _all(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    """Members of one ``kind``, as C declares them: ``int64_t rows, columns;``."""
    return tuple((name, kind) for name in names.split())


class Matrix(C.Structure):
    """``fewbit_matrix``; its members in the order of :data:`fewbit.kernels.native.Matrix`."""

    _fields_ = (
        *_all(C.c_int64, "rows columns block"),
        *_all(C.c_int32, "bits family scale_half offset_half"),
        *_all(C.c_float, "zero"),
        *_all(C.c_void_p, "codes scale offset table"),
        *_all(C.c_int32, "arranged"),
    )


class Vectors(C.Structure):
    """``fewbit_vectors``; its members in the order of :data:`fewbit.kernels.native.VectorMatrix`."""

    _fields_ = (
        *_all(C.c_int64, "rows columns block"),
        *_all(C.c_int32, "dim bits residual_bits half"),
        *_all(C.c_void_p, "codes book residual"),
    )


class ByteVectors(C.Structure):
    """``fewbit_byte_vectors``; its members in the order of :data:`fewbit.kernels.native.ByteVectorMatrix`."""

    _fields_ = (
        *_all(C.c_int64, "rows columns block"),
        *_all(C.c_int32, "dim bits residual_bits"),
        *_all(C.c_void_p, "codes book step offset"),
    )


class RowTables(C.Structure):
    """``fewbit_row_tables``; its members in the order of :data:`fewbit.kernels.native.RowTables`."""

    _fields_ = (
        *_all(C.c_int64, "rows columns block table_rows"),
        *_all(C.c_int32, "bits table_half"),
        *_all(C.c_void_p, "codes table scale"),
        *_all(C.c_int32, "halves"),
    )


class RowLevels(C.Structure):
    """``fewbit_row_levels``; its members in the order of :data:`fewbit.kernels.native.RowLevels`."""

    _fields_ = (
        *_all(C.c_int64, "rows columns table_rows"),
        *_all(C.c_int32, "bits"),
        *_all(C.c_void_p, "codes levels factor"),
        *_all(C.c_int32, "halves"),
    )


class Sparse(C.Structure):
    """``fewbit_sparse``; its members in the order of :data:`fewbit.kernels.native.SparseMatrix`."""

    _fields_ = (
        *_all(C.c_int64, "rows columns"),
        *_all(C.c_int32, "index_bytes value_half"),
        *_all(C.c_void_p, "start order index value"),
    )


class Rounding(C.Structure):
    _fields_ = (
        *_all(C.c_int32, "bits symmetric"),
        *_all(C.c_int64, "block"),
        *_all(C.c_float, "clip scale"),
        *_all(C.c_int32, "zero reserved"),
    )


class Rewrite(C.Structure):
    _fields_ = (
        *_all(C.c_void_p, "factor"),
        *_all(C.c_int64, "block"),
        *_all(C.c_void_p, "matrix"),
        *_all(C.c_int64, "order"),
    )


class Weight(C.Structure):
    """``fewbit_weight``."""


Weight._fields_ = (
    *_all(C.c_int32, "kind isa dtype x_zero"),
    *_all(C.c_int64, "rows columns x_block"),
    ("tiled", C.POINTER(Matrix)),
    *_all(C.c_int64, "parts"),
    ("codebook", Vectors),
    *_all(C.c_void_p, "dense bias"),
    ("rewrite", C.POINTER(Rewrite)),
    *_all(C.c_int64, "rewrites"),
    ("rounding", C.POINTER(Rounding)),
    ("bytes", C.POINTER(ByteVectors)),
    ("row_tables", C.POINTER(RowTables)),
    ("row_levels", C.POINTER(RowLevels)),
    ("sparse", C.POINTER(Sparse)),
    ("term", C.POINTER(Weight)),
    *_all(C.c_int64, "terms"),
    *_all(C.c_void_p, "row_scale column_scale middle order"),
    *_all(C.c_float, "x_scale threshold"),
)


class Mlp(C.Structure):
    _fields_ = _all(Weight, "gate up down")


class Rope(C.Structure):
    _fields_ = (
        *_all(C.c_int64, "pairs"),
        *_all(C.c_void_p, "frequency"),
        *_all(C.c_float, "scale"),
        *_all(C.c_int32, "reserved"),
    )


class Block(C.Structure):
    _fields_ = (
        *_all(C.c_void_p, "norm norm_after mlp_norm mlp_norm_after q_norm k_norm"),
        *_all(C.c_int64, "window"),
        *_all(C.c_int32, "rope experts normalise reserved"),
        *_all(Weight, "q k v o"),
        ("mlp", Mlp),
        *_all(Weight, "router shared_gate"),
        ("expert", C.POINTER(Mlp)),
    )


class Model(C.Structure):
    _fields_ = (
        *_all(C.c_int64, "bytes hidden heads kv_heads head_dim vocabulary layers ropes experts_per_token"),
        *_all(C.c_float, "eps query_scale attention_cap logit_cap logit_scale embedding_scale"),
        *_all(C.c_int32, "activation isa"),
        ("rope", C.POINTER(Rope)),
        ("block", C.POINTER(Block)),
        *_all(C.c_void_p, "norm"),
        *_all(Weight, "embedding head"),
    )
