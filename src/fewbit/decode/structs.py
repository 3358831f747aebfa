# SPDX-License-Identifier: Apache-2.0
"""The structs of ``csrc/include/fewbit.h`` and ``fewbit_decode.h``, member by member. The core refuses a model whose
size differs from its own."""

from __future__ import annotations

import ctypes as C

ABSENT, TILED, CODEBOOK, DENSE, BYTE_CODEBOOK, ROW_TABLES, ROW_LEVELS, SPARSE, SUM, PRODUCT, COLUMNS, OUTLIERS = range(
    12
)
KV = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}


class Matrix(C.Structure):
    """``fewbit_matrix``; its members in the order of :data:`fewbit.kernels.native.Matrix`."""

    _fields_ = (
        ("rows", C.c_int64),
        ("columns", C.c_int64),
        ("block", C.c_int64),
        ("bits", C.c_int32),
        ("family", C.c_int32),
        ("scale_half", C.c_int32),
        ("offset_half", C.c_int32),
        ("zero", C.c_float),
        ("codes", C.c_void_p),
        ("scale", C.c_void_p),
        ("offset", C.c_void_p),
        ("table", C.c_void_p),
        ("arranged", C.c_int32),
    )


class Vectors(C.Structure):
    """``fewbit_vectors``; its members in the order of :data:`fewbit.kernels.native.VectorMatrix`."""

    _fields_ = (
        ("rows", C.c_int64),
        ("columns", C.c_int64),
        ("block", C.c_int64),
        ("dim", C.c_int32),
        ("bits", C.c_int32),
        ("residual_bits", C.c_int32),
        ("half", C.c_int32),
        ("codes", C.c_void_p),
        ("book", C.c_void_p),
        ("residual", C.c_void_p),
    )


class ByteVectors(C.Structure):
    """``fewbit_byte_vectors``; its members in the order of :data:`fewbit.kernels.native.ByteVectorMatrix`."""

    _fields_ = (
        ("rows", C.c_int64),
        ("columns", C.c_int64),
        ("block", C.c_int64),
        ("dim", C.c_int32),
        ("bits", C.c_int32),
        ("residual_bits", C.c_int32),
        ("codes", C.c_void_p),
        ("book", C.c_void_p),
        ("step", C.c_void_p),
        ("offset", C.c_void_p),
    )


class RowTables(C.Structure):
    """``fewbit_row_tables``; its members in the order of :data:`fewbit.kernels.native.RowTables`."""

    _fields_ = (
        ("rows", C.c_int64),
        ("columns", C.c_int64),
        ("block", C.c_int64),
        ("table_rows", C.c_int64),
        ("bits", C.c_int32),
        ("table_half", C.c_int32),
        ("codes", C.c_void_p),
        ("table", C.c_void_p),
        ("scale", C.c_void_p),
        ("halves", C.c_int32),
    )


class RowLevels(C.Structure):
    """``fewbit_row_levels``; its members in the order of :data:`fewbit.kernels.native.RowLevels`."""

    _fields_ = (
        ("rows", C.c_int64),
        ("columns", C.c_int64),
        ("table_rows", C.c_int64),
        ("bits", C.c_int32),
        ("codes", C.c_void_p),
        ("levels", C.c_void_p),
        ("factor", C.c_void_p),
        ("halves", C.c_int32),
    )


class Sparse(C.Structure):
    """``fewbit_sparse``; its members in the order of :data:`fewbit.kernels.native.SparseMatrix`."""

    _fields_ = (
        ("rows", C.c_int64),
        ("columns", C.c_int64),
        ("index_bytes", C.c_int32),
        ("value_half", C.c_int32),
        ("start", C.c_void_p),
        ("order", C.c_void_p),
        ("index", C.c_void_p),
        ("value", C.c_void_p),
    )


class Rounding(C.Structure):
    _fields_ = (
        ("bits", C.c_int32),
        ("symmetric", C.c_int32),
        ("block", C.c_int64),
        ("clip", C.c_float),
        ("scale", C.c_float),
        ("zero", C.c_int32),
        ("reserved", C.c_int32),
    )


class Rewrite(C.Structure):
    _fields_ = (("factor", C.c_void_p), ("block", C.c_int64), ("matrix", C.c_void_p), ("order", C.c_int64))


class Weight(C.Structure):
    """``fewbit_weight``."""


Weight._fields_ = (
    ("kind", C.c_int32),
    ("isa", C.c_int32),
    ("dtype", C.c_int32),
    ("x_zero", C.c_int32),
    ("rows", C.c_int64),
    ("columns", C.c_int64),
    ("x_block", C.c_int64),
    ("tiled", C.POINTER(Matrix)),
    ("parts", C.c_int64),
    ("codebook", Vectors),
    ("dense", C.c_void_p),
    ("bias", C.c_void_p),
    ("rewrite", C.POINTER(Rewrite)),
    ("rewrites", C.c_int64),
    ("rounding", C.POINTER(Rounding)),
    ("bytes", C.POINTER(ByteVectors)),
    ("row_tables", C.POINTER(RowTables)),
    ("row_levels", C.POINTER(RowLevels)),
    ("sparse", C.POINTER(Sparse)),
    ("term", C.POINTER(Weight)),
    ("terms", C.c_int64),
    ("row_scale", C.c_void_p),
    ("column_scale", C.c_void_p),
    ("middle", C.c_void_p),
    ("order", C.c_void_p),
    ("x_scale", C.c_float),
    ("threshold", C.c_float),
)


class Mlp(C.Structure):
    _fields_ = (("gate", Weight), ("up", Weight), ("down", Weight))


class Rope(C.Structure):
    _fields_ = (("pairs", C.c_int64), ("frequency", C.c_void_p), ("scale", C.c_float), ("reserved", C.c_int32))


class Block(C.Structure):
    _fields_ = (
        ("norm", C.c_void_p),
        ("norm_after", C.c_void_p),
        ("mlp_norm", C.c_void_p),
        ("mlp_norm_after", C.c_void_p),
        ("q_norm", C.c_void_p),
        ("k_norm", C.c_void_p),
        ("window", C.c_int64),
        ("rope", C.c_int32),
        ("experts", C.c_int32),
        ("normalise", C.c_int32),
        ("reserved", C.c_int32),
        ("q", Weight),
        ("k", Weight),
        ("v", Weight),
        ("o", Weight),
        ("mlp", Mlp),
        ("router", Weight),
        ("shared_gate", Weight),
        ("expert", C.POINTER(Mlp)),
    )


class Model(C.Structure):
    _fields_ = (
        ("bytes", C.c_int64),
        ("hidden", C.c_int64),
        ("heads", C.c_int64),
        ("kv_heads", C.c_int64),
        ("head_dim", C.c_int64),
        ("vocabulary", C.c_int64),
        ("layers", C.c_int64),
        ("ropes", C.c_int64),
        ("experts_per_token", C.c_int64),
        ("eps", C.c_float),
        ("query_scale", C.c_float),
        ("attention_cap", C.c_float),
        ("logit_cap", C.c_float),
        ("logit_scale", C.c_float),
        ("embedding_scale", C.c_float),
        ("activation", C.c_int32),
        ("isa", C.c_int32),
        ("rope", C.POINTER(Rope)),
        ("block", C.POINTER(Block)),
        ("norm", C.c_void_p),
        ("embedding", Weight),
        ("head", Weight),
    )
