# SPDX-License-Identifier: Apache-2.0
"""How far one stream of logits is from another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def compare_logits(ours: Tensor, reference: Tensor, ids: Tensor) -> tuple[int, list[Tensor]]:
    """Of one window: the number of next tokens, and parts of the sums of: both losses, KL(reference || ours), top-1
    agreement.

    ``ours`` and ``reference``: logits (1, tokens, vocabulary) of ``ids`` (tokens,).
    """
    sums = []
    for part in torch.arange(len(ids) - 1).split(64):  # bounds the copies of (tokens, vocabulary)
        p, q = reference[0, part].float().log_softmax(-1), ours[0, part].float().log_softmax(-1)
        target = ids[part + 1].unsqueeze(1)
        kl = (p.exp() * (p - q)).sum(dtype=torch.float64)
        same = (p.argmax(-1) == q.argmax(-1)).sum()
        sums.append(torch.stack([-p.gather(1, target).sum(), -q.gather(1, target).sum(), kl, same]))
    return len(ids) - 1, sums


def summary(compared: Iterable[tuple[int, list[Tensor]]]) -> dict[str, Any]:
    """Perplexity of both, mean KL in nats, top-1 agreement, from what :func:`compare_logits` gave of each window."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for tokens, parts in compared:
        count += tokens
        for part in parts:
            sums += part
    mean = sums / count
    return {
        "perplexity": float(mean[1].exp()),
        "reference_perplexity": float(mean[0].exp()),
        "kl_mean": float(mean[2]),
        "top1_agreement": float(mean[3]),
        "tokens": count,
    }
