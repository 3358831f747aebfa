# SPDX-License-Identifier: Apache-2.0
"""Grids searched under an importance matrix: the oracle's errors, ggml's, and never worse than rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats
from fewbit.core import blocks as B
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods import imatrix, rtn
from fewbit.methods.imatrix import importance
from oracle.imatrix_oracle import imatrix_oracle

GOLDEN = Path(__file__).parent.parent / "golden" / "imatrix.npz"
TYPES = {
    "q2_k": "int2/g16x16/asym/s4",
    "q3_k": "int3/g16x16/sym/s6",
    "q4_k": "Q4_K",
    "q5_k": "int5/g32x8/asym/s6",
    "q6_k": "Q6_K",
    "q4_0": "Q4_0",
    "q4_1": "Q4_1",
}


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def facts_of(mean_square: Tensor) -> Facts:
    return Facts(len(mean_square), 1, torch.zeros_like(mean_square), mean_square, None)


def errors(weight: Tensor, q: QTensor, facts: Facts) -> Tensor:
    """Weighted errors of spans, float64 (rows, spans)."""
    columns, block = weight.shape[1], q.format.block
    worth = B.split(facts.mean_square.reshape(1, -1), block)
    v = importance(q.format, B.split(weight, block), B.present(columns, block), worth)
    lost = (v * B.split(q.dequantize().double() - weight, block).square()).sum(-1)
    return B.split(lost, max(1, q.format.fit_block // block) if block else 1).sum(-1)


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)


def coded(scale_bits: int, symmetric: bool, scale: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What super scales of one span give back; the symmetric grids here have 8 levels."""
    top = 2 ** (scale_bits - symmetric) - 1
    unit = half(np.abs(scale).max() / top)
    if symmetric:
        code = np.clip(np.round(scale / unit), -top - 1, top)
        code = np.where(code == 0, np.where(scale < 0, -1, 1), code)
        return unit * code, -4 * unit * code
    low = half(np.max(-offset) / top)
    depth = low * np.round(-offset / low) if low else 0 * offset
    return unit * np.clip(np.round(scale / unit), 1, top), -depth


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize(
    ("name", "kind", "store"),
    [
        ("int4/g8x4/asym/s6", "asym", lambda s, o: coded(6, False, s, o)),
        ("int2/g8x4/asym/s4", "asym", lambda s, o: coded(4, False, s, o)),
        ("int3/g8x4/sym/s6", "sym", lambda s, o: coded(6, True, s, o)),
        ("int4/g32/min", "min", lambda s, o: (half(s), half(o))),
        ("int3/g32/sym", "sym", lambda s, o: (half(s), -4 * half(s))),
    ],
)
def test_errors_are_those_of_the_oracle(name: str, kind: str, store, rounds: int) -> None:  # type: ignore[no-untyped-def]
    weight, format = normal(6, 64), formats.parse(name)
    weight[3] += 2  # blocks above zero
    facts = facts_of(normal(1, 64, 1)[0].mul(2).exp())
    found = errors(weight, imatrix(weight, format, facts, steps=11, rounds=rounds), facts)
    plain = errors(weight, rtn(weight, format), facts)
    for row in range(6):
        for span, start in enumerate((0, 32)):
            w = weight[row, start : start + 32].double().numpy().reshape(-1, format.block)
            worth = facts.mean_square[start : start + 32].double().numpy().reshape(-1, format.block)
            least = imatrix_oracle(w, worth, format.levels, kind, store, 11, rounds)
            # float32 decodes what the oracle decodes in float64
            assert float(found[row, span]) == pytest.approx(min(least, float(plain[row, span])), rel=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_next_to_ggml(kind: str) -> None:
    """ggml searches the super scale as well, which is what it may be ahead by: a part of a step of 4 or 6 bits."""
    with np.load(GOLDEN, allow_pickle=False) as data:
        weight, worth, values, plain = (
            torch.from_numpy(data[key]).float() for key in ("weight", "mean_square", f"{kind}.values", f"{kind}.plain")
        )
    facts, format = facts_of(worth), formats.parse(TYPES[kind])
    own = imatrix(weight, format, facts)
    v = importance(
        format, B.split(weight, format.block), B.present(512, format.block), B.split(worth[None], format.block)
    )
    lost = [
        float((v * B.split(found.double() - weight, format.block).square()).sum())
        for found in (own.dequantize(), values, plain, rtn(weight, format).dequantize())
    ]
    assert lost[0] < 1.03 * lost[1]
    assert lost[0] < lost[2] and lost[0] < lost[3]


@pytest.mark.parametrize(
    "name", ["Q4_K", "int3/g16x16/sym/s6", "int4/g8/asym", "int2/g8/sym", "int4/g8/min", "int2/channel/asym"]
)
def test_never_worse_than_rounding_and_blind_to_padding(name: str) -> None:
    format = formats.parse(name)
    weight, facts = normal(5, 77, 2), facts_of(normal(1, 77, 3)[0].mul(3).exp())
    q = imatrix(weight, format, facts, steps=9)
    lost, plain = errors(weight, q, facts), errors(weight, rtn(weight, format), facts)
    assert bool((lost <= plain).all()) and float(lost.sum()) < float(plain.sum())
    if format.block == format.fit_block == 8:  # the same without its last block, which is short
        cut = imatrix(weight[:, :72], format, facts_of(facts.mean_square[:72]), steps=9)
        assert torch.equal(cut.dequantize(), q.dequantize()[:, :72])


def test_a_negative_scale_gives_the_larger_side_the_level_more() -> None:
    weight = torch.tensor([[0.0, 1, 2, 3, 4, -1, -2, -3]])
    q = imatrix(weight, formats.parse("int3/g8/sym"), None)
    assert float(q.params["scale"][0, 0, 0]) < 0 and torch.equal(q.dequantize(), weight)


def test_inputs_that_were_never_seen() -> None:
    weight = normal(3, 64)
    worth = torch.zeros(64)
    worth[:7] = 1
    for name in ("Q4_K", "int4/g8/sym", "int4/g8/min"):
        format = formats.parse(name)
        q = imatrix(weight, format, facts_of(worth))
        assert bool(q.dequantize().isfinite().all())
        if format.fit_block == 8:
            assert torch.equal(q.dequantize()[:, 8:], rtn(weight, format).dequantize()[:, 8:])


def test_what_is_refused() -> None:
    with pytest.raises(SpecError, match="at least 2 steps"):
        imatrix(normal(2, 8), formats.parse("int4/g8"), steps=1)
    for name in ("nf4/g8", "palette4", "vector4x8", "sign/g8"):
        with pytest.raises(UnsupportedError, match="imatrix to"):
            imatrix(normal(8, 8), formats.parse(name))
