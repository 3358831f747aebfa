# SPDX-License-Identifier: Apache-2.0
"""Who computes: :data:`KERNELS` is the table, best first; ``reference`` takes everything and is the oracle.
:data:`SPARSE_KERNELS` add few entries onto what these compute."""

from typing import TYPE_CHECKING

from fewbit.kernels import native
from fewbit.later import later

if TYPE_CHECKING:
    from fewbit.kernels import reference
    from fewbit.kernels.column8 import COLUMN8
    from fewbit.kernels.conv import conv2d, route
    from fewbit.kernels.native import set_threads
    from fewbit.kernels.ops import embedding, linear, prepare
    from fewbit.kernels.prepared import Prepared, PreparedMatrix
    from fewbit.kernels.products import matmul
    from fewbit.kernels.rewrites import Rewriting
    from fewbit.kernels.sparse import SPARSE_KERNELS, SparseKernel, choose_sparse
    from fewbit.kernels.table import KERNELS, Choice, Kernel, choose
    from fewbit.kernels.terms import PreparedTerms
    from fewbit.kernels.tile16 import TILE16
    from fewbit.kernels.tiled import linear_many
    from fewbit.kernels.vector16 import VECTOR16
    from fewbit.kernels.window import Window

_NAMES = {
    "column8": ("COLUMN8",),
    "conv": ("conv2d", "route"),
    "native": ("set_threads",),
    "ops": ("embedding", "linear", "prepare"),
    "prepared": ("Prepared", "PreparedMatrix"),
    "products": ("matmul",),
    "reference": ("reference",),
    "rewrites": ("Rewriting",),
    "sparse": ("SPARSE_KERNELS", "SparseKernel", "choose_sparse"),
    "table": ("KERNELS", "Choice", "Kernel", "choose"),
    "terms": ("PreparedTerms",),
    "tile16": ("TILE16",),
    "tiled": ("linear_many",),
    "vector16": ("VECTOR16",),
    "window": ("Window",),
}
__getattr__ = later(__name__, {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names})

__all__ = [
    "COLUMN8",
    "KERNELS",
    "SPARSE_KERNELS",
    "TILE16",
    "VECTOR16",
    "Choice",
    "Kernel",
    "Prepared",
    "PreparedMatrix",
    "PreparedTerms",
    "Rewriting",
    "SparseKernel",
    "Window",
    "choose",
    "choose_sparse",
    "conv2d",
    "embedding",
    "linear",
    "linear_many",
    "matmul",
    "native",
    "prepare",
    "reference",
    "route",
    "set_threads",
]
