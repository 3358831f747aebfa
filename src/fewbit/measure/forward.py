# SPDX-License-Identifier: Apache-2.0
"""What computes the logits of a window: transformers, or whatever else a caller brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Forward:
    """``logits``: ids (tokens,) -> (tokens, vocabulary), row ``t`` after token ``t``, of at most ``context`` tokens
    (None: any number). ``about``: what computes them, for the report."""

    about: str
    context: int | None
    logits: Callable[[Tensor], Tensor]


def through_transformers(model: Any) -> Forward:
    """The model's own forward pass, in eval mode whatever mode a model in memory is in."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def logits(ids: Tensor) -> Tensor:
        training = model.training
        model.eval()
        try:
            result: Tensor = model(ids.unsqueeze(0).to(model.device), use_cache=False).logits[0]
        finally:
            model.train(training)
        return result

    return Forward("transformers", int(limit) if limit else None, logits)
