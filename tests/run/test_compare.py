# SPDX-License-Identifier: Apache-2.0
"""Two streams of logits compared, against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.run.compare import PART, compare_logits, summary
from fewbit.run.stages import scored
from fewbit.run.state import TOGETHER


@pytest.mark.parametrize("tokens", [2, PART, PART + 1, 2 * PART + 3])
@pytest.mark.parametrize("windows", [1, 3])
def test_figures_are_those_of_the_definition(windows: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    reference = (3 * torch.randn(windows, tokens, 50, generator=generator)).half()
    ours = reference.float() + torch.randn(windows, tokens, 50, generator=generator)
    ids = torch.randint(50, (windows, tokens), generator=generator)
    found = summary([compare_logits(ours[:, :-1], reference[:, :-1], ids[:, 1:])])

    p, q = (each[:, :-1].double().reshape(-1, 50).numpy() for each in (reference, ours))
    p, q = (each - np.log(np.exp(each).sum(1, keepdims=True)) for each in (p, q))
    rows, targets = np.arange(windows * (tokens - 1)), ids[:, 1:].reshape(-1).numpy()
    assert found["tokens"] == windows * (tokens - 1)
    assert found["top1_agreement"] == (p.argmax(1) == q.argmax(1)).mean()
    wanted = {
        "reference_perplexity": np.exp(-p[rows, targets].mean()),
        "perplexity": np.exp(-q[rows, targets].mean()),
        "kl_mean": (np.exp(p) * (p - q)).sum(1).mean(),
    }
    # float32 logarithms of up to about 20, and sums of 50 terms
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=50 * 20 * 2.0**-24), name
    means = (np.exp(p) * (p - q)).sum(1).reshape(windows, -1).mean(1)
    error = means.std(ddof=1) / windows**0.5 if windows > 1 else 0.0
    assert found["kl_mean_stderr"] == pytest.approx(error, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("windows", [1, 2, 16, 17, 2 * TOGETHER + 1])
def test_every_second_token_is_scored_and_the_others_in_the_next_window(windows: int) -> None:
    tokens = torch.arange(windows * 5).reshape(windows, 5)
    parts = scored(tokens)
    assert all(len(part) <= TOGETHER for part in parts)
    found = sorted(token for part in parts for token in part.flatten().tolist())
    assert found == [int(tokens[w, t]) for w in range(windows) for t in range(5) if (w + t) % 2 == 0]
