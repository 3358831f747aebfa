# SPDX-License-Identifier: Apache-2.0
"""How far one stream of logits is from another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PART = 64
"""Tokens at a time: bounds the copies of (tokens, vocabulary)."""


def compare_logits(ours: Tensor, reference: Tensor, targets: Tensor) -> list[Tensor]:
    """Of each window, float64: the number of tokens, and sums of both losses, KL(reference || ours), top-1 agreement.

    ``ours`` and ``reference``: logits (windows, tokens, vocabulary) of what comes next, ``targets`` (windows, tokens).
    """
    return [
        torch.stack([_compared(*part) for part in zip(*(stream.split(PART) for stream in window), strict=True)]).sum(0)
        for window in zip(reference, ours, targets, strict=True)
    ]


def _compared(floating: Tensor, quantized: Tensor, wanted: Tensor) -> Tensor:
    """The five sums of :func:`compare_logits` over some tokens of one window."""
    p, q = floating.float().log_softmax(-1), quantized.float().log_softmax(-1)
    losses = [-each.gather(1, wanted.unsqueeze(1)).sum(dtype=torch.float64) for each in (p, q)]
    # numpy's argmax runs in vector registers, torch's does not; both give the first of equals.
    same = torch.as_tensor((p.numpy().argmax(-1) == q.numpy().argmax(-1)).sum())
    kl = p.exp().mul_(p.sub_(q)).sum(-1).sum(dtype=torch.float64)
    return torch.stack([torch.tensor(float(len(wanted)), dtype=torch.float64), *losses, kl, same.double()])


def summary(compared: Iterable[list[Tensor]]) -> dict[str, Any]:
    """Perplexity of both, mean KL in nats with its standard error, top-1 agreement, from what :func:`compare_logits`
    gave of all windows. The error is that of a mean over windows, each weighing as much as it has tokens."""
    windows = torch.stack([window for some in compared for window in some])
    mean = windows.sum(0) / windows[:, 0].sum()
    apart = windows[:, 3] - mean[3] * windows[:, 0]
    error = apart.norm() * math.sqrt(len(windows) / max(1, len(windows) - 1)) / windows[:, 0].sum()
    return {
        "perplexity": float(mean[2].exp()),
        "reference_perplexity": float(mean[1].exp()),
        "kl_mean": float(mean[3]),
        "kl_mean_stderr": float(error),
        "top1_agreement": float(mean[4]),
        "tokens": int(windows[:, 0].sum()),
    }
