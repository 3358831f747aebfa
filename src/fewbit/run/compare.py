# SPDX-License-Identifier: Apache-2.0
"""How far one stream of logits is from another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

PART = 64
"""Tokens at a time: bounds the copies of (tokens, vocabulary)."""


def compare_logits(ours: Tensor, reference: Tensor, targets: Tensor) -> tuple[int, list[Tensor]]:
    """Of some windows: the number of tokens, and parts of the sums of: both losses, KL(reference || ours), top-1
    agreement.

    ``ours`` and ``reference``: logits (windows, tokens, vocabulary) of what comes next, ``targets`` (windows, tokens).
    """
    sums = []
    for floating, quantized, wanted in _parts(reference, ours, targets):
        p, q = floating.float().log_softmax(-1), quantized.float().log_softmax(-1)
        losses = [-each.gather(1, wanted.unsqueeze(1)).sum() for each in (p, q)]
        # numpy's argmax runs in vector registers, torch's does not; both give the first of equals.
        same = torch.as_tensor((p.numpy().argmax(-1) == q.numpy().argmax(-1)).sum())
        kl = p.exp().mul_(p.sub_(q)).sum(-1).sum(dtype=torch.float64)
        sums.append(torch.stack([*losses, kl, same]))
    return targets.numel(), sums


def _parts(*streams: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of each window of all (windows, tokens, ...), at most :data:`PART` tokens at a time."""
    for window in zip(*streams, strict=True):
        yield from zip(*(stream.split(PART) for stream in window), strict=True)


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
