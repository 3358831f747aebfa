# SPDX-License-Identifier: Apache-2.0
"""Estimates of harm: the sums that they say they are, and nats a token on a model whose divergence is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewbit.core.facts import Facts
from fewbit.search import harm

ROWS, COLUMNS, SEQUENCES, TOKENS = 5, 7, 2000, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(gram: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Facts]:
    """(x, weight, error, facts) of a softmax of W x, tokens of a sequence apart from one another, labels of its own."""
    one = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS, generator=one, dtype=torch.float64) * 0.5
    mix = torch.randn(COLUMNS, COLUMNS, generator=one, dtype=torch.float64) * 0.6
    x = torch.randn(SEQUENCES * TOKENS, COLUMNS, generator=one, dtype=torch.float64) @ mix
    p = (x @ weight.T).softmax(1)
    label = torch.multinomial(p, 1, generator=one)
    at_outputs = p.scatter_add(1, label, torch.full_like(label, -1, dtype=torch.float64))
    gradient = torch.einsum("sto,sti->soi", *(v.reshape(SEQUENCES, TOKENS, -1) for v in (at_outputs, x))) / TOKENS
    error = torch.randn(ROWS, COLUMNS, generator=one, dtype=torch.float64) * 0.01
    fisher, output_square = gradient.square().sum(0).float(), (at_outputs / TOKENS).square().sum(0).float()
    return x, weight, error, replace(Facts.of(x.float(), gram=gram), fisher=fisher, output_square=output_square)


HALF = TOKENS / (2 * SEQUENCES)


def divergence(x: torch.Tensor, weight: torch.Tensor, error: torch.Tensor) -> float:
    """Mean KL of the tokens when W becomes W - D."""
    p, q = (x @ weight.T).log_softmax(1), (x @ (weight - error).T).log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def test_the_sums_are_those_of_the_definitions() -> None:
    _, _, error, facts = draw()
    d, f = error.numpy(), facts.fisher.double().numpy()
    gram = facts.gram.double().numpy()
    expected = sum(f[o, i] * d[o, i] ** 2 for o in range(ROWS) for i in range(COLUMNS))
    assert harm.fisher(error, facts, 0.25) == pytest.approx(0.25 * expected, rel=1e-5)
    rows = facts.output_square.double().numpy() / (SEQUENCES * TOKENS)
    expected = sum(rows[o] * d[o] @ gram @ d[o] for o in range(ROWS))
    assert harm.output(error, facts, 0.25) == pytest.approx(0.25 * expected, rel=1e-5)
    *_, alone = draw(gram=False)
    expected = sum(rows[o] * d[o] @ np.diag(np.diag(gram)) @ d[o] for o in range(ROWS))
    assert harm.output(error, alone, 0.25) == pytest.approx(0.25 * expected, rel=1e-5)


def test_output_is_nats_a_token() -> None:
    """Of a softmax of W x, whose outputs' gradients are correlated, which the estimate leaves out: on average over
    errors of either sign that adds nothing, so a mean over many errors is compared. Larger inputs have smaller
    gradients here, which the estimate takes to be independent of them: it is too high, by 28 %."""
    x, weight, _, facts = draw()
    one = torch.Generator().manual_seed(9)
    errors = [torch.randn(ROWS, COLUMNS, generator=one, dtype=torch.float64) * 0.01 for _ in range(12)]
    estimated = sum(harm.output(error, facts, HALF) for error in errors)
    assert estimated == pytest.approx(sum(divergence(x, weight, error) for error in errors), rel=0.4)


def test_experts_add_up_and_those_without_tokens_do_no_harm() -> None:
    _, weight, error, facts = draw()
    none = Facts.none(COLUMNS, gram=True)
    empty = replace(none, fisher=torch.zeros(ROWS, COLUMNS))
    for by in harm.ESTIMATES:
        alone = harm.of_layer(by, weight, weight - error, [facts], HALF)
        stacked = [torch.cat([value, value]) for value in (weight, weight - error)]
        assert harm.of_layer(by, *stacked, [facts, facts], HALF) == pytest.approx(2 * alone)
        assert harm.of_layer(by, *stacked, [empty, facts], HALF) == pytest.approx(alone)
