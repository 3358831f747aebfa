# SPDX-License-Identifier: Apache-2.0
"""Format names to formats."""

from __future__ import annotations

import re

from fewbit.core.format import Format
from fewbit.errors import SpecError
from fewbit.formats.affine import Affine

_INT = re.compile(r"int([1-8])(?:/(?:g(\d+)|(channel)))?(?:/(sym|asym))?")


def parse(text: str) -> Format:
    """The format spelt ``text``.

    Raises:
        SpecError: it spells no format.
    """
    if match := _INT.fullmatch(text.strip().lower()):
        bits, group, channel, symmetry = match.groups()
        return Affine(int(bits), 0 if channel else int(group or 128), symmetry != "asym")
    raise SpecError(f"format {text!r}", "not a format", "for example int4/g128/asym, int3/g64 or nf4/g64")
