# SPDX-License-Identifier: Apache-2.0
"""Draws against their definition, written here once more with loops in float64, and their frequencies by chi-square."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fewbit.decode import sampling as S
from fewbit.decode.sampling import Sampler, Sampling
from fewbit.errors import InputError, SpecError
from fewbit.kernels import native

NEAR = 1e-6
"""Where a sum comes this close to a border, float32 may decide otherwise: above 2 * 2^-21, the error of a share."""
DRAWS = [
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="no native module")),
    "reference",
]


def draw(how: str, row: np.ndarray, sampler: Sampler) -> int:
    tensor = torch.tensor(row, dtype=torch.float32)
    if how == "reference":
        return S.sample_reference(tensor, sampler)
    token = S.sample(tensor[None], [sampler])[0]
    return -1 if isinstance(token, InputError) else token


def likely(row: np.ndarray, s: Sampling, prompt: list[int], text: list[int], top_p: float, min_p: float) -> dict:
    """Token -> share, in the words of fewbit_sample.h."""
    x = [float(value) for value in row]
    for token, bias in s.logit_bias.items():
        x[token] += bias
    for token in set(prompt) | set(text):
        x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
        x[token] -= s.frequency_penalty * text.count(token) + s.presence_penalty * (token in text)
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if s.temperature == 0:
        return {order[0]: 1.0}
    order = order[: s.top_k] if s.top_k else order
    weights = {token: math.exp((x[token] - x[order[0]]) / s.temperature) for token in order}
    total, reached, kept = math.fsum(weights.values()), 0.0, []
    for token in order:
        kept.append(token)
        reached += weights[token] / total
        if reached >= top_p:
            break
    return {token: weights[token] for token in sorted(kept) if weights[token] >= min_p or token == order[0]}


def falls(shares: dict[int, float], u: float) -> int:
    """The token in whose share u falls."""
    left = u * math.fsum(shares.values())
    for token, share in shares.items():
        left -= share
        if left < 0:
            return token
    return max(token for token, share in shares.items() if share > 0)


def permitted(token: int, row: np.ndarray, s: Sampling, prompt: list[int], text: list[int], u: float) -> bool:
    """Whether ``token`` may be drawn, given that borders are decided within NEAR."""
    near = (1, 1 - NEAR, 1 + NEAR)
    return any(
        token == falls(likely(row, s, prompt, text, s.top_p * p, s.min_p * m), min(max(u + shift - 1, 0.0), 1.0))
        for p, m, shift in itertools.product(near, near, near)
    )


def eighths(least: float, most: float) -> st.SearchStrategy[float]:
    """Numbers that float32 adds without rounding, with many ties."""
    return st.integers(int(least * 8), int(most * 8)).map(lambda n: n / 8)


@st.composite
def cases(make: Any) -> tuple[np.ndarray, Sampling, list[int], list[int]]:
    vocab = make(st.sampled_from([1, 2, 7, 31, 33, 97]))
    token = st.integers(0, vocab - 1)
    logit = st.one_of(eighths(-10, 10), st.just(-math.inf))
    row = np.array(make(st.lists(logit, min_size=vocab, max_size=vocab)))
    row[make(token)] = make(eighths(-4, 10))
    s = Sampling(
        temperature=make(st.sampled_from([0, 0.25, 0.5, 1, 2, 8])),
        top_k=make(st.one_of(st.just(0), st.integers(1, vocab + 3))),
        top_p=make(st.one_of(st.just(1.0), st.floats(0, 1))),
        min_p=make(st.one_of(st.just(0.0), st.floats(0, 1))),
        repetition_penalty=make(st.sampled_from([0.5, 1, 2])),
        frequency_penalty=make(eighths(-2, 2)),
        presence_penalty=make(eighths(-2, 2)),
        seed=make(st.integers(-(1 << 63), (1 << 64) - 1)),
        logit_bias=make(st.dictionaries(token, eighths(-100, 100), max_size=4)),
    )
    return row, s, make(st.lists(token, max_size=9)), make(st.lists(token, max_size=9))


@given(case=cases())
@settings(deadline=None, max_examples=300)
def test_a_draw_is_its_definition(case: tuple[np.ndarray, Sampling, list[int], list[int]]) -> None:
    row, s, prompt, text = case
    sampler = Sampler(s, prompt, len(row), branch=3)
    for token in text:
        sampler.take(token)
    u = S.uniform(s.seed & ((1 << 64) - 1), len(text), 3)  # type: ignore[operator]
    for how in ["native"] * native.available() + ["reference"]:  # to make a case takes longer than to draw
        assert permitted(draw(how, row, sampler), row, s, prompt, text, u), how


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1, 0), (40, 1, 0), (0, 0.9, 0), (3000, 0.999, 0.01)])
def test_a_draw_from_a_real_vocabulary_is_its_definition(how: str, top_k: int, top_p: float, min_p: float) -> None:
    row = np.random.default_rng(0).normal(0, 3, 49152).astype(np.float32)
    for seed in range(4):
        s = Sampling(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        found = draw(how, row, Sampler(s, [], len(row)))
        assert permitted(found, row, s, [], [], S.uniform(seed, 0, 0))


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1, 0), (5, 1, 0), (0, 0.8, 0), (0, 1, 0.1), (9, 0.95, 0.02)])
def test_frequencies(how: str, top_k: int, top_p: float, min_p: float) -> None:
    row = np.random.default_rng(1).normal(0, 1.5, 23)
    s = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, seed=1)
    sampler, draws = Sampler(s, [], len(row)), 2000
    found: Counter[int] = Counter()
    for _ in range(draws):
        token = draw(how, row, sampler)
        sampler.take(token)
        found[token] += 1
    shares = likely(row, s, [], [], top_p, min_p)
    assert set(found) <= set(shares)
    total = sum(shares.values())
    often = {token: share / total for token, share in shares.items() if share / total * draws >= 5}
    rest = 1 - sum(often.values())
    observed = [found[token] for token in often] + ([draws - sum(found[t] for t in often)] if rest > 1e-9 else [])
    expected = [draws * share for share in often.values()] + ([draws * rest] if rest > 1e-9 else [])
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    rows = torch.randn(8, 999, generator=torch.Generator().manual_seed(0))
    together = S.sample(rows.clone(), [Sampler(Sampling(seed=5), [], 999, branch=b) for b in range(8)])
    alone = [S.sample(rows[b : b + 1].clone(), [Sampler(Sampling(seed=5), [], 999, branch=b)])[0] for b in range(8)]
    assert together == alone
    assert len(set(together)) > 3  # and branches differ


def test_seeds_positions_and_branches_are_streams_of_their_own() -> None:
    drawn = {
        S.uniform(seed, position, branch) for seed in (0, 1, 1 << 40) for position in range(50) for branch in (0, 1)
    }
    assert len(drawn) == 300
    assert stats.kstest([S.uniform(9, position, 0) for position in range(2000)], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 1025, 3000])
def test_the_likeliest_is_the_first_of_the_largest(size: int) -> None:
    """The walk is cut into pieces of 1024: equals lie in two of them, at borders, and beyond the whole vectors."""
    chance = np.random.default_rng(size)
    for _ in range(50):
        row = chance.integers(-3, 3, size).astype(np.float32)
        row[chance.random(size) < 0.1] = -math.inf
        row[chance.integers(size)] = 2
        expected = int(np.flatnonzero(row == row.max())[0])
        sampler = Sampler(Sampling(temperature=0), [], size)
        assert S.sample([memoryview(row.copy())], [sampler]) == [expected]
        row[chance.integers(size)] = math.nan
        assert isinstance(S.sample([memoryview(row)], [sampler])[0], InputError)


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_fail_their_own_row(how: str, bad: float) -> None:
    row = np.zeros(40)
    row[33] = bad
    assert draw(how, row, Sampler(Sampling(), [], 40)) == -1
    assert draw(how, np.full(40, -math.inf), Sampler(Sampling(), [], 40)) == -1
    rows = torch.tensor(np.stack([row, np.arange(40.0)]), dtype=torch.float32)
    first, second = S.sample(rows, [Sampler(Sampling(temperature=0), [], 40) for _ in range(2)])
    assert isinstance(first, InputError) and "finite" in str(first)
    assert second == 39


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -1e-9),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -math.inf),
        ("seed", 1 << 64),
        ("seed", 0.5),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {-3: 1.0}),
        ("logit_bias", {3: 101}),
        ("stop", ("",)),
        ("stop", "END"),
        ("stop", ("a",) * 17),
    ],
)
def test_nonsense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(SpecError, match="token 40"):
        Sampler(Sampling(logit_bias={40: 1.0}), [], 40)


def test_seen_tokens_beyond_the_first_room_are_kept() -> None:
    sampler = Sampler(Sampling(presence_penalty=1), [5, 5, 6], 500)
    for token in range(300):
        sampler.take(token)
        sampler.take(7)
    seen, counts = sampler.seen
    assert dict(zip(seen.tolist(), counts.tolist(), strict=True)) == dict.fromkeys(range(300), 1) | {7: 301}


@pytest.mark.parametrize("size", [1, 7, 50, 49152])
@pytest.mark.parametrize("find", [S.logprobs, S.logprobs_reference])
def test_logprobs_are_those_of_the_model(find: Any, size: int) -> None:
    row = 4 * torch.randn(size, generator=torch.Generator().manual_seed(2))
    row[size // 3] = row[size // 2]  # a tie
    found = find(row, size - 1, 4)
    x = row.double().numpy()
    p = np.exp(x - math.log(math.fsum(np.exp(x))))
    assert found.taken == pytest.approx(math.log(p[-1]), abs=1e-12)
    assert [token for token, _ in found.top] == np.argsort(-p, kind="stable")[:4].tolist()
    assert [log for _, log in found.top] == pytest.approx(sorted(np.log(p), reverse=True)[:4], abs=1e-12)
    assert find(row, 0, 0).top == ()


def test_logprobs_of_what_cannot_be_are_minus_infinity() -> None:
    row = torch.tensor([-math.inf, 1.0, -math.inf])
    assert S.logprobs(row, 0, 3) == S.logprobs_reference(row, 0, 3)
    assert S.logprobs(row, 2, 1) == S.Logprobs(-math.inf, ((1, 0.0),))
