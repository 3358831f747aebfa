# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL, agreement and their errors against float64 loops written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.errors import VerificationError
from fewbit.measure import accuracy
from fewbit.measure.accuracy import Scores, mean_and_error, perplexity, score, summarize, summarize_reference

EPS = 2.0**-23


def make(seed: int, tokens: int, vocabulary: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (tokens, vocabulary) of a model, of a reference near it, and the window (tokens,)."""
    generator = torch.Generator().manual_seed(seed)
    reference = spread * torch.randn(tokens, vocabulary, generator=generator)
    logits = reference + 0.3 * spread * torch.randn(tokens, vocabulary, generator=generator)
    return logits, reference, torch.randint(0, vocabulary, (tokens,), generator=generator)


def oracle(
    logits: Tensor, ids: Tensor, reference: Tensor, unscored: int
) -> tuple[list[float], list[float], list[float]]:
    """NLL, KL and agreement of every scored token, in float64, one token and one vocabulary entry at a time."""
    nll, kl, agree = [], [], []
    for position in range(unscored, len(ids)):
        q, p = (table[position - 1].double().tolist() for table in (logits, reference))
        log_q = [value - math.log(sum(math.exp(other - max(q)) for other in q)) - max(q) for value in q]
        log_p = [value - math.log(sum(math.exp(other - max(p)) for other in p)) - max(p) for value in p]
        nll.append(-log_q[int(ids[position])])
        kl.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
        agree.append(float(q.index(max(q)) == p.index(max(p))))
    return nll, kl, agree


def rounding(*logits: Tensor) -> float:
    """Bound on the error of one float32 log-probability: exp and sum over the vocabulary, log, two subtractions."""
    largest = max(float(table.abs().max()) for table in logits)
    return EPS * (2 * largest + 2 * math.log(logits[0].shape[1]) + logits[0].shape[1] ** 0.5 + 8)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(2, 12),
    vocabulary=st.integers(2, 40),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    data=st.data(),
)
def test_scores_equal_the_definitions(
    seed: int, tokens: int, vocabulary: int, spread: float, data: st.DataObject
) -> None:
    unscored = data.draw(st.integers(1, tokens - 1))
    logits, reference, ids = make(seed, tokens, vocabulary, spread)
    found = score(logits, ids, reference, unscored)
    nll, kl, agree = oracle(logits, ids, reference, unscored)
    bound = rounding(logits, reference)
    np.testing.assert_allclose(found.nll, nll, rtol=0, atol=bound)
    # sum of p (log p - log q): both logarithms are off by `bound`, each product rounds by eps of its size
    largest = float((logits - reference).abs().max()) * 2 + 1
    np.testing.assert_allclose(found.kl, kl, rtol=0, atol=2 * bound + largest * (bound + 4 * EPS))
    np.testing.assert_array_equal(found.agree, agree)


def test_a_model_that_knows_the_next_token_has_perplexity_one() -> None:
    ids = torch.tensor([3, 1, 4, 1, 5, 0, 2, 6])
    certain = torch.full((8, 7), -50.0)
    certain[torch.arange(7), ids[1:]] = 50.0
    assert perplexity([score(certain, ids).nll])[0] == pytest.approx(1.0, abs=1e-12)
    shifted = torch.full((8, 7), -50.0)
    shifted[torch.arange(8), ids] = 50.0
    assert perplexity([score(shifted, ids).nll])[0] > 1e20


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    assert perplexity([score(torch.zeros(9, 11), torch.arange(9)).nll])[0] == pytest.approx(11, rel=9 * EPS)


def test_a_model_does_not_diverge_from_itself() -> None:
    logits, _, ids = make(1, 20, 33, 4.0)
    found = score(logits, ids, logits.clone())
    assert found.kl is not None and found.agree is not None
    assert np.all(found.kl == 0) and np.all(found.agree == 1)


def test_kl_is_from_the_reference_to_the_model() -> None:
    """With p = (0.9, 0.1) and q = (0.5, 0.5) the two directions differ: 0.368 against 0.511 nats."""
    p, q = torch.tensor([[0.9, 0.1]] * 2).log(), torch.tensor([[0.5, 0.5]] * 2).log()
    found = score(q, torch.tensor([0, 0]), p)
    assert found.kl is not None
    assert found.kl[0] == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)


def test_a_permuted_vocabulary_is_caught() -> None:
    logits, _, ids = make(2, 64, 50, 4.0)
    found = score(logits[:, torch.arange(50).roll(1)], ids, logits)
    assert found.kl is not None and found.agree is not None
    assert found.kl.mean() > 1 and found.agree.mean() < 0.2


def test_tokens_that_both_rule_out_add_nothing() -> None:
    logits, reference, ids = make(3, 8, 12, 2.0)
    ids = ids % 10
    masked = [table.clone() for table in (logits, reference)]
    for table in masked:
        table[:, 10:] = -math.inf
    whole, part = score(masked[0], ids, masked[1]), score(logits[:, :10], ids, reference[:, :10])
    assert whole.kl is not None and part.kl is not None
    np.testing.assert_allclose(whole.kl, part.kl, rtol=0, atol=2 * rounding(logits, reference))


def test_a_token_that_only_the_model_rules_out_is_infinitely_far() -> None:
    logits, reference, ids = make(3, 8, 12, 2.0)
    logits[:, 11] = -math.inf
    found = score(logits, ids % 10, reference)
    assert found.kl is not None and np.all(np.isinf(found.kl))


def test_nan_is_refused() -> None:
    logits, reference, ids = make(4, 8, 12, 2.0)
    broken = logits.clone()
    broken[3, 5] = math.nan
    with pytest.raises(VerificationError, match="the model"):
        score(broken, ids, reference)
    with pytest.raises(VerificationError, match="the reference"):
        score(logits, ids, broken)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, reference, ids = make(5, 31, 17, 3.0)
    whole = score(logits, ids, reference)
    monkeypatch.setattr(accuracy, "CHUNK_BYTES", 4 * 17 * 7)
    parts = score(logits, ids, reference)
    for name in ("nll", "reference_nll", "kl", "agree"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_errors_are_clustered_by_window() -> None:
    """Two windows that agree within and differ between: 4 tokens carry the information of 2."""
    mean, error = mean_and_error([np.array([1.0, 1.0]), np.array([3.0, 3.0])])
    assert (mean, error) == (2.0, 1.0)
    _, alone = mean_and_error([np.array([1.0, 1.0, 3.0, 3.0])])
    assert alone == pytest.approx(math.sqrt(4 / 3 / 4))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(0, 20), min_size=1, max_size=9), min_size=2, max_size=9))
def test_the_clustered_error_equals_its_formula(values: list[list[float]]) -> None:
    mean, error = mean_and_error([np.array(window) for window in values])
    tokens = sum(len(window) for window in values)
    expected = sum(value for window in values for value in window) / tokens
    squares = sum(sum(value - expected for value in window) ** 2 for window in values)
    assert mean == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert error == pytest.approx(math.sqrt(len(values) / (len(values) - 1) * squares) / tokens, rel=1e-6, abs=1e-9)


def test_the_error_covers_the_truth() -> None:
    """Windows with a common component: the true mean lies within two errors in about 95 % of repetitions.

    With 40 windows and 300 repetitions the share is binomial: below 0.90 or above 0.99 has a chance below 1e-4.
    """
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        common = generator.normal(size=(40, 1))
        mean, error = mean_and_error(list(common + generator.normal(size=(40, 25))))
        inside += abs(mean) < 2 * error
    assert 0.90 < inside / 300 < 0.99


def test_summary_against_the_definitions() -> None:
    windows = [make(seed, 40, 30, 3.0) for seed in range(6)]
    scores = [score(logits, ids, reference) for logits, reference, ids in windows]
    found, before = summarize(scores), summarize_reference(scores)
    every = [oracle(logits, ids, reference, 1) for logits, reference, ids in windows]
    nll, kl, agree = (np.concatenate([np.array(window[i]) for window in every]) for i in range(3))
    assert found["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert found["kl_mean"] == pytest.approx(kl.mean(), rel=1e-5)
    assert found["kl_p999"] == pytest.approx(np.quantile(kl, 0.999), rel=1e-5)
    assert found["top1_agreement"] == agree.mean()
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / before["perplexity"], rel=1e-12)
    assert (
        0
        < found["perplexity_ratio_stderr"] / found["perplexity_ratio"]
        < found["perplexity_stderr"] / found["perplexity"]
    )
    assert set(before) == set(found)


def test_without_a_reference_only_perplexity_is_there() -> None:
    found = summarize([Scores(np.array([1.0, 2.0])), Scores(np.array([3.0]))])
    assert set(found) == {"perplexity", "perplexity_stderr"}
    assert found["perplexity"] == pytest.approx(math.exp(2))


def test_an_overflowing_perplexity_is_infinite_and_not_an_error() -> None:
    assert perplexity([np.array([900.0, 900.0])])[0] == math.inf
