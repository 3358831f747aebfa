# SPDX-License-Identifier: Apache-2.0
"""Formats: which values exist. Spelt in one line, parsed in :mod:`fewbit.formats.spelling` and nowhere else."""

from __future__ import annotations

from fewbit.formats.affine import Affine
from fewbit.formats.fixed import Fixed
from fewbit.formats.minimum import Minimum
from fewbit.formats.mxfp4 import MXFP4
from fewbit.formats.nvfp4 import NVFP4
from fewbit.formats.outliers import Outliers
from fewbit.formats.palette import Palette
from fewbit.formats.schemes import SCHEMES, Scheme, scheme
from fewbit.formats.sign import Sign
from fewbit.formats.spelling import EXAMPLES, parse
from fewbit.formats.superblock import Superblock
from fewbit.formats.table import Table
from fewbit.formats.ternary import Ternary
from fewbit.formats.vector import Vector

__all__ = [
    "EXAMPLES",
    "MXFP4",
    "NVFP4",
    "SCHEMES",
    "Affine",
    "Fixed",
    "Minimum",
    "Outliers",
    "Palette",
    "Scheme",
    "Sign",
    "Superblock",
    "Table",
    "Ternary",
    "Vector",
    "parse",
    "scheme",
]
