# SPDX-License-Identifier: Apache-2.0
"""What learns when a whole model does: layers and vectors, each for itself or some as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit import methods
from fewbit.containers import terms as T
from fewbit.core import format as F
from fewbit.core.descent import Descent
from fewbit.core.qtensor import QTensor, stack
from fewbit.core.terms import matrices
from fewbit.core.tuning import Learnable, ModelTuning, Tuning
from fewbit.methods.floats import FloatVector
from fewbit.run.rewriting import placed


@dataclass(frozen=True, eq=False)
class Part:
    """One parameter that is learned. ``layer``: the name of its layer, or "" of a vector. ``rows`` of the matrix."""

    parameter: str
    layer: str
    transposed: bool
    rows: int


@dataclass(frozen=True, eq=False)
class Member:
    """What learns as one matrix, or vector: its ``parts`` one below the other."""

    parts: tuple[Part, ...]
    learner: Learnable | FloatVector
    descent: Descent

    @property
    def rows(self) -> list[int]:
        return [part.rows for part in self.parts]

    def weight(self) -> Tensor:
        """What its values stand for now."""
        return self.learner.weight(self.descent.values)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer that can learn by ``tuning``: its float weight (rows, columns), and unpacked what stands for it."""

    part: Part
    tuning: Tuning
    weight: Tensor
    made: T.Weight

    def beside(self, other: Candidate) -> bool:
        """Whether both can learn as one matrix."""
        one, two = self.made, other.made
        return (
            isinstance(one, QTensor)
            and isinstance(two, QTensor)
            and (self.tuning.name, one.format, one.shape[1]) == (other.tuning.name, two.format, two.shape[1])
            and one.format.height == 1
            and all(F.stackable(each.format, each.shape[0]) for each in (one, two))
        )


def joined(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """What learns as one matrix, wherever some can."""
    groups: list[list[Candidate]] = []
    for one in candidates:
        group = next((each for each in groups if each[0].beside(one)), None)
        groups.append([one]) if group is None else group.append(one)
    return groups


def begin(group: Sequence[Candidate], rate: float, device: torch.device) -> Member:
    """``group`` about to learn on ``device``."""
    tuning = group[0].tuning
    made = group[0].made if len(group) == 1 else stack([one.made for one in group])  # type: ignore[misc]
    learner = tuning.learn(*placed((torch.cat([one.weight for one in group]), made), device))
    descent = Descent(learner.start, learner.bounds, tuning.descend(), rate)
    return Member(tuple(one.part for one in group), learner, descent)


def fitting(row: ModelTuning, weight: T.Weight) -> Tuning | str:
    """The tuning by which a layer of ``weight`` learns, or why it has none."""
    reasons = []
    for name in row.by:
        tuning = methods.tuning(name)
        if not isinstance(weight, QTensor) and not tuning.sums:
            continue
        refused = [tuning.refuse(one.format) for one in matrices(weight)]
        if None in refused:
            return tuning
        reasons.append(refused[0] or "")
    return reasons[-1] if reasons else "it is a sum of terms"
