# SPDX-License-Identifier: Apache-2.0
"""How far one stream of logits is from another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PART = 64
"""Tokens at a time: bounds the copies of (tokens, vocabulary)."""


def compare_logits(ours: Tensor, reference: Tensor, ids: Tensor) -> tuple[int, list[Tensor]]:
    """Of one window: the number of next tokens, and parts of the sums of: both losses, KL(reference || ours), top-1
    agreement.

    ``ours`` and ``reference``: logits (1, tokens, vocabulary) of ``ids`` (tokens,).
    """
    sums = []
    parts = zip(reference[0, :-1].split(PART), ours[0, :-1].split(PART), ids[1:].split(PART), strict=True)
    for floating, quantized, targets in parts:
        p, q = floating.float().log_softmax(-1), quantized.float().log_softmax(-1)
        losses = [-each.gather(1, targets.unsqueeze(1)).sum() for each in (p, q)]
        # numpy's argmax runs in vector registers, torch's does not; both give the first of equals.
        same = torch.as_tensor((p.numpy().argmax(-1) == q.numpy().argmax(-1)).sum())
        kl = p.exp().mul_(p.sub_(q)).sum(-1).sum(dtype=torch.float64)
        sums.append(torch.stack([*losses, kl, same]))
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
