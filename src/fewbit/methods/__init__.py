# SPDX-License-Identifier: Apache-2.0
"""Methods: which codes to choose, a literal table; and tunings, those of :mod:`fewbit.methods.tunings`."""

from __future__ import annotations

from fewbit.core.method import Method
from fewbit.core.rows import find
from fewbit.methods.arb import arb
from fewbit.methods.arb import parts as arb_parts
from fewbit.methods.autoround import autoround
from fewbit.methods.autoround import refuse as refuse_searched
from fewbit.methods.awq import awq
from fewbit.methods.awq import refuse as refuse_awq
from fewbit.methods.billm import billm
from fewbit.methods.billm import parts as billm_parts
from fewbit.methods.clip import clip
from fewbit.methods.gptq import agrees, gptq
from fewbit.methods.hqq import hqq
from fewbit.methods.hqq import refuse as refuse_hqq
from fewbit.methods.imatrix import imatrix
from fewbit.methods.imatrix import refuse as refuse_uneven
from fewbit.methods.laq import laq
from fewbit.methods.laq import parts as laq_parts
from fewbit.methods.nanoquant import nanoquant
from fewbit.methods.nanoquant import parts as nanoquant_parts
from fewbit.methods.objective import refuse_vectors, relative_error
from fewbit.methods.ptq161 import parts as ptq161_parts
from fewbit.methods.ptq161 import ptq161
from fewbit.methods.ptq161 import refuse as refuse_ptq161
from fewbit.methods.rtn import rtn
from fewbit.methods.sensitive import refuse as refuse_unclustered
from fewbit.methods.signs import refuse as refuse_no_signs
from fewbit.methods.signs import refuse_groups
from fewbit.methods.skm import refuse as refuse_unlearned
from fewbit.methods.skm import skm
from fewbit.methods.squeezellm import beside as sparse_beside
from fewbit.methods.squeezellm import squeezellm
from fewbit.methods.tunings import LIMITS, MODEL_TUNINGS, STEPS, TUNINGS, model_tuning, tuning
from fewbit.methods.vptq import parts as vptq_parts
from fewbit.methods.vptq import refuse as refuse_scalars
from fewbit.methods.vptq import vptq

__all__ = [
    "METHODS",
    "MODEL_TUNINGS",
    "TUNINGS",
    "arb",
    "autoround",
    "awq",
    "billm",
    "clip",
    "gptq",
    "hqq",
    "imatrix",
    "laq",
    "model_tuning",
    "named",
    "nanoquant",
    "ptq161",
    "relative_error",
    "rtn",
    "skm",
    "squeezellm",
    "tuning",
    "vptq",
]

_TRIES = (2, 10_000)
_FLOOR = (0.01, 0.99)
_SHARE = (0.0, 1.0)
_ROUNDS = (0, 10_000)
_COLUMNS = (1, 1 << 20)

METHODS: tuple[Method, ...] = (
    Method("rtn", rtn, needs="nothing", source="Jacob et al. 2018, arXiv:1712.05877"),
    Method(
        "clip",
        clip,
        needs="mean_square",
        options={"steps": 24, "floor": 0.4},
        limits={"steps": _TRIES, "floor": _FLOOR},
        refuse=refuse_vectors,
        source="range search weighted by E[x^2], as in github.com/IST-DASLab/gptq (quant.py)",
    ),
    Method(
        "laq",
        laq,
        needs="mean_square",
        options={
            "statistic": "mse",
            "percentile": 99.0,
            "steps": 24,
            "floor": 0.4,
            "mean_bits": 0.0,
            "widths": "2,3,4,8",
            "tile": 1,
        },
        limits={
            "percentile": (50.0, 100.0),
            "steps": _TRIES,
            "floor": _FLOOR,
            "mean_bits": (0.0, 16.0),
            "tile": _COLUMNS,
        },
        refuse=refuse_vectors,
        parts=laq_parts,
        source="a policy without a paper; its rule for bits is of Shoham, Gersho 1988",
    ),
    Method(
        "imatrix",
        imatrix,
        needs="mean_square",
        options={"steps": 37, "rounds": 2},
        limits={"steps": _TRIES, "rounds": _ROUNDS},
        refuse=refuse_uneven,
        work=1e5,
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
        limits={"damp_percent": _SHARE, "block_size": _COLUMNS, "steps": _TRIES, "floor": _FLOOR},
        refuse=refuse_vectors,
        agrees=agrees,
        source="Frantar et al. 2022, arXiv:2210.17323",
    ),
    Method(
        "awq",
        awq,
        needs="gram",
        options={"steps": 20, "floor": 0.5},
        limits={"steps": _TRIES, "floor": _FLOOR},
        refuse=refuse_awq,
        work=1e5,
        source="clip search of Lin et al. 2023, arXiv:2306.00978 (github.com/mit-han-lab/llm-awq)",
    ),
    Method(
        "hqq",
        hqq,
        needs="nothing",
        options={"p": 0.7, "beta": 10.0, "kappa": 1.01, "iterations": 20},
        limits={"p": (0.01, 1.0), "beta": (1e-6, 1e6), "kappa": (1.0, 100.0), "iterations": _ROUNDS},
        refuse=refuse_hqq,
        work=3e4,
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
        limits={"outliers": (0.0, 0.1), "sensitive": (0.0, 0.1)},
        refuse=refuse_unclustered,
        beside=sparse_beside,
        source="Kim et al. 2023, arXiv:2306.07629",
    ),
    Method(
        "vptq",
        vptq,
        needs="gram",
        options={
            "damp_percent": 0.01,
            "block_size": 128,
            "restarts": 2,
            "rounds": 6,
            "beam": 8,
            "never_worse": True,
            "outliers": 0.0,
            "outlier_length": 2,
            "outlier_bits": 6,
            "outlier_residual_bits": 0,
            "norm": "none",
        },
        limits={
            "damp_percent": _SHARE,
            "block_size": _COLUMNS,
            "restarts": (1, 1000),
            "rounds": _ROUNDS,
            "beam": (1, 4096),
            "outliers": (0.0, 0.99),
            "outlier_length": (1, 16),
            "outlier_bits": (1, 16),
            "outlier_residual_bits": (0, 16),
        },
        refuse=refuse_scalars,
        parts=vptq_parts,
        work=1.5e6,
        source="Liu et al. 2024, arXiv:2409.17066",
    ),
    Method(
        "ptq161",
        ptq161,
        needs="largest",
        options={"salient": 0.2, "salient_bits": 4},
        limits={"salient": _SHARE, "salient_bits": (2, 8)},
        refuse=refuse_ptq161,
        parts=ptq161_parts,
        work=7e4,
        source="Zhao et al. 2025, arXiv:2502.13179",
    ),
    Method(
        "billm",
        billm,
        needs="gram",
        options={"salient": 0.1, "damp_percent": 0.01, "points": 9},
        limits={"salient": _SHARE, "damp_percent": _SHARE, "points": (1, 10_000)},
        refuse=refuse_no_signs,
        parts=billm_parts,
        work=2e5,
        source="Huang et al. 2024, arXiv:2402.04291",
    ),
    Method(
        "arb",
        arb,
        needs="mean_square",
        options={"iterations": 15},
        limits={"iterations": (1, 10_000)},
        refuse=refuse_no_signs,
        parts=arb_parts,
        work=7e4,
        source="Li et al. 2024, arXiv:2410.03129",
    ),
    Method(
        "nanoquant",
        nanoquant,
        needs="fisher",
        options={"bits": 1.0, "iterations": 100, "rounds": 10},
        limits={"bits": (0.01, 8.0), "iterations": (1, 100_000), "rounds": _ROUNDS},
        refuse=refuse_groups,
        parts=nanoquant_parts,
        work=2e6,
        source="Chong et al. 2026, arXiv:2602.06694; scales of Lee et al. 2025, arXiv:2506.13771",
    ),
    Method(
        "autoround",
        autoround,
        needs="nothing",
        options=STEPS,
        limits=LIMITS,
        refuse=refuse_searched,
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
