# SPDX-License-Identifier: Apache-2.0
"""How far one stream of logits is from another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def compare_logits(ours: Iterator[Tensor], reference: Iterable[Tensor], ids: Tensor) -> dict[str, Any]:
    """Perplexity of both, mean KL(reference || ours) in nats, and top-1 agreement, over the probe's next tokens.

    ``ours`` and ``reference``: logits (1, tokens, vocabulary), one entry a window of ``ids``.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for mine, theirs, row in zip(ours, reference, ids, strict=True):
        for part in torch.arange(len(row) - 1).split(64):  # bounds the copies of (tokens, vocabulary)
            p, q = theirs[0, part].float().log_softmax(-1), mine[0, part].float().log_softmax(-1)
            target = row[part + 1].unsqueeze(1)
            kl = (p.exp() * (p - q)).sum(dtype=torch.float64)
            same = (p.argmax(-1) == q.argmax(-1)).sum()
            sums += torch.stack([-p.gather(1, target).sum(), -q.gather(1, target).sum(), kl, same])
            count += len(part)
    mean = sums / count
    return {
        "perplexity": float(mean[1].exp()),
        "reference_perplexity": float(mean[0].exp()),
        "kl_mean": float(mean[2]),
        "top1_agreement": float(mean[3]),
        "tokens": count,
    }
