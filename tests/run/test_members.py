# SPDX-License-Identifier: Apache-2.0
"""Layers that learn as one matrix, as on a GPU: what each would learn alone, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor, stack, unstack
from fewbit.run.hidden import HiddenTensor
from fewbit.run.members import Candidate, Part, begin, joined

CPU = torch.device("cpu")
ROWS = (3, 5)


def candidate(seed: int, rows: int, spelling: str, tuning: str) -> Candidate:
    weight = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    made = methods.rtn(weight, formats.parse(spelling), Facts.of(weight))
    return Candidate(Part(f"layer{seed}.weight", f"layer{seed}", False, rows), methods.tuning(tuning), weight, made)


@pytest.mark.parametrize(
    ("spelling", "tuning"),
    [("int2/g8/asym", "weights"), ("int3/g8x2/asym/s6", "rounding"), ("int3/g8/sym", "scales"), ("nf4/g8", "scales")],
)
def test_one_matrix_learns_as_its_parts(spelling: str, tuning: str) -> None:
    each = [candidate(seed, rows, spelling, tuning) for seed, rows in enumerate(ROWS)]
    (group,) = joined(each)
    whole, alone = begin(group, 0.01, CPU), [begin([one], 0.01, CPU) for one in each]
    assert whole.rows == list(ROWS)
    for _ in range(3):
        weights = whole.learner.weight(whole.values)
        assert torch.equal(weights, torch.cat([one.learner.weight(one.values) for one in alone]))
        slopes = whole.learner.gradient(whole.values, weights - 1)
        for name, found in slopes.items():
            whole.values[name] -= 0.01 * found.sign()
        for one, part in zip(alone, weights.split(whole.rows), strict=True):
            for name, found in one.learner.gradient(one.values, part - 1).items():
                one.values[name] -= 0.01 * found.sign()
    frozen = unstack(whole.learner.freeze(whole.values), whole.rows)  # type: ignore[union-attr, arg-type]
    for made, one in zip(frozen, alone, strict=True):
        expected = one.learner.freeze(one.values)  # type: ignore[union-attr]
        assert made.shape == expected.shape
        assert torch.equal(made.dequantize(), expected.dequantize())


def test_what_differs_stays_apart() -> None:
    """Formats, tunings, and parameters that all rows of a matrix share."""
    kinds = [("int2/g8/asym", "weights"), ("int2/g8/asym", "rounding"), ("int2/g8/sym", "weights")]
    kinds += [("palette2", "scales"), ("palette2", "scales")]
    assert [len(group) for group in joined([candidate(0, 3, *kind) for kind in kinds])] == [1] * 5


def test_unstacking_is_the_inverse_of_stacking() -> None:
    parts = [candidate(seed, rows, "int3/g8/asym", "scales").made for seed, rows in enumerate(ROWS)]
    again = unstack(stack(parts), ROWS)  # type: ignore[arg-type]
    for one, two in zip(parts, again, strict=True):
        assert isinstance(one, QTensor)
        assert two.shape == one.shape and torch.equal(two.packed, one.packed)
        assert all(torch.equal(two.params[name], one.params[name]) for name in one.params)


def test_hidden_states_in_memory_are_those_written() -> None:
    kept, values = HiddenTensor((2, 1, 3, 4), CPU), torch.randn(2, 1, 3, 4)
    for index in (1, 0):
        kept.write(index, values[index][0])
    assert all(torch.equal(kept.read(index), values[index]) for index in range(2))
