# SPDX-License-Identifier: Apache-2.0
"""Tunings: what a block learns once its layers are solved, or the whole model. Two literal tables."""

from __future__ import annotations

from fewbit.core.descent import Adam, SignSGD
from fewbit.core.rows import find
from fewbit.core.tuning import ModelTuning, Tuning
from fewbit.methods import bounds, scales, sums, vectors
from fewbit.methods.autoround import Rounding, Weights, rate, refuse, weights_rate

STEPS: dict[str, float] = {"iters": 200, "batch": 8, "lr": 0.0, "relative": 1.0, "cosine": 0.0, "own": 0.0}
LIMITS: dict[str, tuple[float, float]] = {
    "iters": (0, 100_000),
    "batch": (1, 1024),
    "lr": (0.0, 1.0),
    "relative": (0.0, 1.0),
    "cosine": (0.0, 100.0),
    "own": (0.0, 100.0),
}

TUNINGS: tuple[Tuning, ...] = (
    Tuning(
        "rounding",
        Rounding,
        SignSGD,
        rate,
        refuse,
        options=STEPS,
        limits=LIMITS,
        source="Cheng et al. 2023, arXiv:2309.05516",
    ),
    Tuning(
        "weights",
        Weights,
        Adam,
        weights_rate,
        refuse,
        options=STEPS,
        limits=LIMITS,
        source="first phase of Chen et al. 2024, arXiv:2407.11062",
    ),
    Tuning(
        "scales",
        sums.learned,
        Adam,
        scales.rate,
        scales.refuse,
        options=STEPS,
        limits=LIMITS,
        sums=True,
        source="second phase of Chen et al. 2024, arXiv:2407.11062, block by block",
    ),
    Tuning(
        "books",
        sums.learned,
        Adam,
        vectors.books_rate,
        vectors.refuse,
        options=STEPS,
        limits=LIMITS,
        sums=True,
        source="layer-wise phase of Liu et al. 2024, arXiv:2409.17066, block by block",
    ),
    Tuning(
        "vectors",
        sums.chosen,
        SignSGD,
        vectors.rate,
        vectors.refuse,
        options=STEPS,
        limits=LIMITS,
        sums=True,
        source="Cheng et al. 2023, arXiv:2309.05516, for vectors",
    ),
    Tuning(
        "bounds",
        bounds.Bounds,
        Adam,
        bounds.rate,
        refuse,
        options=STEPS,
        limits=LIMITS,
        inputs=True,
        source="second stage of Liu et al. 2024, arXiv:2406.06649",
    ),
)

_WHOLE: dict[str, float] = {"iters": 200, "batch": 8, "lr": 0.0, "vectors": 1, "label": 0.0, "windows": 0, "warmup": 0}
_WHOLE_LIMITS: dict[str, tuple[float, float]] = {
    **{name: LIMITS[name] for name in ("iters", "batch", "lr")},
    "vectors": (0, 1),
    "label": (0.0, 100.0),
    "windows": (0, 1_000_000),
    "warmup": (0, 100_000),
}

MODEL_TUNINGS: tuple[ModelTuning, ...] = (
    ModelTuning(
        "distill",
        {"books": 0.006, "scales": 0.006},
        _WHOLE,
        _WHOLE_LIMITS,
        source="second phase of Chen et al. 2024, arXiv:2407.11062; loss of Hinton et al. 2015, arXiv:1503.02531",
    ),
    ModelTuning(
        "distill-codes",
        {"rounding": 0.01, "vectors": 0.01, "scales": 0.006},
        _WHOLE,
        _WHOLE_LIMITS,
        source="Cheng et al. 2023, arXiv:2309.05516, on the loss of Hinton et al. 2015, arXiv:1503.02531",
    ),
    ModelTuning(
        "distill-weights",
        {"weights": 0.003, "vectors": 0.01, "scales": 0.006},
        _WHOLE,
        _WHOLE_LIMITS,
        source="Liu et al. 2023, arXiv:2305.17888; steps of Chen et al. 2024, arXiv:2407.11062",
    ),
)


def tuning(name: str) -> Tuning:
    """The tuning called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    return find(TUNINGS, name, "tuning", MODEL_TUNINGS, f'end = "{name}"')


def model_tuning(name: str) -> ModelTuning:
    """The tuning of a whole model called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    return find(MODEL_TUNINGS, name, "model tuning")
