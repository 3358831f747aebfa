# SPDX-License-Identifier: Apache-2.0
"""Methods: which codes to choose, and tunings: what a block learns after that. Two literal tables."""

from __future__ import annotations

from fewbit.core.descent import Adam, SignSGD
from fewbit.core.method import Method
from fewbit.core.rows import find
from fewbit.core.tuning import Tuning
from fewbit.methods import autoround as rounding
from fewbit.methods import scales
from fewbit.methods.autoround import autoround
from fewbit.methods.awq import awq
from fewbit.methods.awq import refuse as refuse_awq
from fewbit.methods.clip import clip
from fewbit.methods.gptq import gptq
from fewbit.methods.hqq import hqq
from fewbit.methods.hqq import refuse as refuse_hqq
from fewbit.methods.imatrix import imatrix
from fewbit.methods.imatrix import refuse as refuse_uneven
from fewbit.methods.objective import refuse_vectors, relative_error
from fewbit.methods.rtn import rtn
from fewbit.methods.sensitive import refuse as refuse_unclustered
from fewbit.methods.skm import refuse as refuse_unlearned
from fewbit.methods.skm import skm
from fewbit.methods.squeezellm import beside as sparse_beside
from fewbit.methods.squeezellm import squeezellm

__all__ = [
    "METHODS",
    "TUNINGS",
    "autoround",
    "awq",
    "clip",
    "gptq",
    "hqq",
    "imatrix",
    "named",
    "relative_error",
    "rtn",
    "skm",
    "squeezellm",
    "tuning",
]

_STEPS: dict[str, float] = {"iters": 200, "batch": 8, "lr": 0.0, "relative": 1.0}
_LIMITS: dict[str, tuple[float, float]] = {
    "iters": (0, 100_000),
    "batch": (1, 1024),
    "lr": (0.0, 1.0),
    "relative": (0.0, 1.0),
}

TUNINGS: tuple[Tuning, ...] = (
    Tuning(
        "rounding",
        rounding.Rounding,
        SignSGD,
        rounding.rate,
        rounding.refuse,
        options=_STEPS,
        limits=_LIMITS,
        source="Cheng et al. 2023, arXiv:2309.05516",
    ),
    Tuning(
        "scales",
        scales.Scales,
        Adam,
        scales.rate,
        scales.refuse,
        options=_STEPS,
        limits=_LIMITS,
        source="second phase of Chen et al. 2024, arXiv:2407.11062, block by block",
    ),
)

METHODS: tuple[Method, ...] = (
    Method("rtn", rtn, needs="nothing", source="Jacob et al. 2018, arXiv:1712.05877"),
    Method(
        "clip",
        clip,
        needs="mean_square",
        options={"steps": 24, "floor": 0.4},
        refuse=refuse_vectors,
        source="range search weighted by E[x^2], as in github.com/IST-DASLab/gptq (quant.py)",
    ),
    Method(
        "imatrix",
        imatrix,
        needs="mean_square",
        options={"steps": 37, "rounds": 2},
        refuse=refuse_uneven,
        source="k-quants under an importance matrix, github.com/ggml-org/llama.cpp (ggml-quants.c)",
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
        refuse=refuse_unlearned,
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
    Method(
        "autoround",
        autoround,
        needs="nothing",
        options=_STEPS,
        refuse=rounding.refuse,
        tuning="rounding",
        source="Cheng et al. 2023, arXiv:2309.05516",
    ),
)


def named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    return find(METHODS, name, "method")


def tuning(name: str) -> Tuning:
    """The tuning called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    return find(TUNINGS, name, "tuning")
