# SPDX-License-Identifier: Apache-2.0
"""Transforms: which function-preserving rewrite to do first. One literal table."""

from __future__ import annotations

from fewbit.core.rows import find
from fewbit.core.transform import ModelTransform, Transform, seed_of
from fewbit.transforms.awq import awq, powers
from fewbit.transforms.hadamard import hadamard
from fewbit.transforms.hadamard import refuse as refuse_hadamard
from fewbit.transforms.rotate import refuse, rotate
from fewbit.transforms.smooth import smooth

__all__ = ["MODEL_TRANSFORMS", "TRANSFORMS", "awq", "hadamard", "named", "named_model", "rotate", "seed_of", "smooth"]

TRANSFORMS: tuple[Transform, ...] = (
    Transform(
        "smooth",
        smooth,
        makes="scale",
        needs="largest",
        options={"alpha": 0.5},
        limits={"alpha": (0.0, 1.0)},
        source="Xiao et al. 2022, arXiv:2211.10438",
    ),
    Transform(
        "rotate",
        rotate,
        makes="rotation",
        needs="nothing",
        refuse=refuse,
        source="Ashkboos et al. 2024, arXiv:2404.00456",
    ),
    Transform(
        "awq",
        awq,
        makes="scale",
        needs="gram",
        options={"steps": 20, "samples": 16},
        limits={"steps": (1, 1000), "samples": (0, 1_000_000)},
        rounds=True,
        powers=powers,
        source="Lin et al. 2023, arXiv:2306.00978",
    ),
    Transform(
        "hadamard",
        hadamard,
        makes="hadamard",
        needs="nothing",
        refuse=refuse_hadamard,
        source="Ashkboos et al. 2024, arXiv:2404.00456",
    ),
)

_QUAROT: dict[str, float] = {"heads": 1, "down": 1, "output": 0}
_SWITCHES: dict[str, tuple[float, float]] = dict.fromkeys(_QUAROT, (0, 1))

MODEL_TRANSFORMS: tuple[ModelTransform, ...] = (
    ModelTransform("quarot", _QUAROT, _SWITCHES, source="Ashkboos et al. 2024, arXiv:2404.00456"),
    ModelTransform(
        "spinquant",
        {**_QUAROT, "steps": 100, "rate": 1.5, "batch": 8, "kl": 0},
        {**_SWITCHES, "steps": (1, 10_000), "rate": (1e-6, 100.0), "batch": (1, 1024), "kl": (0, 1)},
        learns=True,
        source="Liu et al. 2024, arXiv:2405.16406",
    ),
)


def named(name: str) -> Transform:
    """The transform called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    return find(TRANSFORMS, name, "transform", MODEL_TRANSFORMS, f'model = "{name}"')


def named_model(name: str) -> ModelTransform:
    """The model transform called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    return find(MODEL_TRANSFORMS, name, "model transform")
