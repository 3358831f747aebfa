# SPDX-License-Identifier: Apache-2.0
"""Methods: which codes to choose. One literal table."""

from __future__ import annotations

from fewbit.core.method import Method
from fewbit.errors import SpecError
from fewbit.methods.awq import awq
from fewbit.methods.awq import refuse as refuse_awq
from fewbit.methods.clip import clip
from fewbit.methods.gptq import gptq
from fewbit.methods.hqq import hqq
from fewbit.methods.hqq import refuse as refuse_hqq
from fewbit.methods.objective import refuse_vectors, relative_error
from fewbit.methods.rtn import rtn
from fewbit.methods.sensitive import refuse as refuse_unclustered
from fewbit.methods.skm import skm
from fewbit.methods.squeezellm import beside as sparse_beside
from fewbit.methods.squeezellm import squeezellm

__all__ = ["METHODS", "awq", "clip", "gptq", "hqq", "named", "relative_error", "rtn", "skm", "squeezellm"]

METHODS: tuple[Method, ...] = (
    Method("rtn", rtn, needs="nothing", source="Jacob et al. 2018, arXiv:1712.05877"),
    Method(
        "clip",
        clip,
        needs="mean_square",
        options={"steps": 24, "floor": 0.4},
        refuse=refuse_vectors,
        source="range search weighted by E[x^2], as in github.com/IST-DASLab/gptq (quant.py) and llama.cpp's imatrix",
    ),
    Method(
        "gptq",
        gptq,
        needs="gram",
        options={
            "damp_percent": 0.01,
            "desc_act": True,
            "static_groups": True,
            "block_size": 128,
            "clip": True,
            "steps": 24,
            "floor": 0.4,
            "never_worse": True,
        },
        refuse=refuse_vectors,
        source="Frantar et al. 2022, arXiv:2210.17323",
    ),
    Method(
        "awq",
        awq,
        needs="gram",
        options={"steps": 20, "floor": 0.5},
        refuse=refuse_awq,
        source="clip search of Lin et al. 2023, arXiv:2306.00978 (github.com/mit-han-lab/llm-awq)",
    ),
    Method(
        "hqq",
        hqq,
        needs="nothing",
        options={"p": 0.7, "beta": 10.0, "kappa": 1.01, "iterations": 20},
        refuse=refuse_hqq,
        source="Badri, Shaji 2023, github.com/mobiusml/hqq",
    ),
    Method(
        "skm",
        skm,
        needs="fisher",
        refuse=refuse_unclustered,
        source="objective of Kim et al. 2023, arXiv:2306.07629; sensitive k-means of coremltools",
    ),
    Method(
        "squeezellm",
        squeezellm,
        needs="fisher",
        options={"outliers": 0.004, "sensitive": 0.0005},
        refuse=refuse_unclustered,
        beside=sparse_beside,
        source="Kim et al. 2023, arXiv:2306.07629",
    ),
)


def named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise SpecError(f"method {name!r}", "no such method", f"methods are {', '.join(m.name for m in METHODS)}")
