# SPDX-License-Identifier: Apache-2.0
"""Layouts: where the bits lie. One literal table."""

from __future__ import annotations

from fewbit.core.layout import UNPACKED, Layout
from fewbit.core.rows import find
from fewbit.layouts.awq import AWQ
from fewbit.layouts.compressed_tensors import COMPRESSED_TENSORS
from fewbit.layouts.dense import DENSE
from fewbit.layouts.gptq import GPTQ, GPTQ_V2
from fewbit.layouts.pairs import PAIRS
from fewbit.layouts.planes import PLANES
from fewbit.layouts.q4_0 import Q4_0
from fewbit.layouts.q4_1 import Q4_1
from fewbit.layouts.q4_k import Q4_K
from fewbit.layouts.q6_k import Q6_K
from fewbit.layouts.q8_0 import Q8_0
from fewbit.layouts.tq1_0 import TQ1_0
from fewbit.layouts.tq2_0 import TQ2_0
from fewbit.layouts.trits import TRITS

LAYOUTS: tuple[Layout, ...] = (
    UNPACKED,
    DENSE,
    PAIRS,
    PLANES,
    TRITS,
    GPTQ,
    GPTQ_V2,
    AWQ,
    COMPRESSED_TENSORS,
    Q8_0,
    Q4_0,
    Q4_1,
    Q4_K,
    Q6_K,
    TQ1_0,
    TQ2_0,
)


def named(name: str) -> Layout:
    """The layout called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    return find(LAYOUTS, name, "layout")
