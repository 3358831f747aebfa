# SPDX-License-Identifier: Apache-2.0
"""Formats: which values exist. Spelt in one line, parsed here and nowhere else."""

from __future__ import annotations

from fewbit.formats.affine import Affine
from fewbit.formats.spelling import parse

__all__ = ["Affine", "parse"]
