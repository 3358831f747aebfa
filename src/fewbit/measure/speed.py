# SPDX-License-Identifier: Apache-2.0
"""Speed of a loaded model as a user meets it: transformers' own ``generate``, greedy, batch 1, with its KV cache.

One run reads a prompt and writes ``decode_tokens + 1`` tokens; the clock is read each time a token is out. Prefill is
the prompt over the time to the first token; decode is ``decode_tokens`` over the time from the first token to the last.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.measure.energy import Meter, meter
from fewbit.model.hooks import hooked
from fewbit.model.layers import ExpertBank, QuantLinear

PROBE_TOKENS = 16
"""Decode steps of the pass that times linear layers; hooks slow it, so it is kept apart from the speed runs."""


@dataclass(frozen=True)
class Run:
    """One timed generation. ``joules`` covers decode only and is None without a meter."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    joules_per_token: float | None


@contextmanager
def _settled(model: Any) -> Iterator[None]:
    """Eval mode and no gradients inside; the model's own mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


class Generator:
    """``generate`` on one prompt. ``prompt``: (1, tokens) int64."""

    def __init__(self, model: Any, prompt: Tensor, decode_tokens: int) -> None:
        self.model, self.decode_tokens = model, decode_tokens
        self.prompt = prompt.to(model.device)
        self.meter: Meter = meter(model.device.type)
        self.linear = linear_modules(model)

    def _stamps(self, tokens: int, on_token: Any = None) -> tuple[float, list[float]]:
        """Start, and the times at which ``tokens`` new tokens were out."""
        from transformers import GenerationConfig, StoppingCriteriaList

        stamps: list[float] = []

        def watch(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            if ids.is_cuda:
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            if on_token is not None:
                on_token(len(stamps))
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        greedy = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, use_cache=True
        )
        with _settled(self.model):
            start = time.perf_counter()
            self.model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                generation_config=greedy,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        if len(stamps) != tokens:
            raise UnsupportedError(
                f"time {tokens} generated tokens", f"the model stopped after {len(stamps)}", "use fewer decode tokens"
            )
        return start, stamps

    def run(self) -> Run:
        """One timed generation."""
        before: dict[Any, int] = {}

        def on_token(number: int) -> None:
            if number == 1 and self.meter.source is not None:
                before.update(self.meter.read())

        start, stamps = self._stamps(self.decode_tokens + 1, on_token)
        joules = self.meter.joules(before, self.meter.read()) / self.decode_tokens if before else None
        return Run(self.prompt.shape[1] / (stamps[0] - start), self.decode_tokens / (stamps[-1] - stamps[0]), joules)

    def kernels(self) -> dict[str, int]:
        """Which kernel runs how many of the quantized layers; empty for a float model."""
        return dict(Counter(m.prepared.kernel for m in self.model.modules() if isinstance(m, QuantLinear)))

    def linear_share(self) -> float | None:
        """Share of decode time spent inside linear layers, 0 to 1; None when the model has none that can be told."""
        if not self.linear:
            return None
        clock = _Clock()
        entering = (module.register_forward_pre_hook(clock.enter) for module in self.linear)
        leaving = (module.register_forward_hook(clock.leave) for module in self.linear)
        with hooked(entering), hooked(leaving):
            tokens = min(PROBE_TOKENS, self.decode_tokens) + 1
            _, stamps = self._stamps(tokens, lambda number: clock.reset() if number == 1 else None)
        return clock.total / (stamps[-1] - stamps[0])


class _Clock:
    """Time inside the outermost of nested modules."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.depth, self.total, self.start = 0, 0.0, 0.0

    def enter(self, module: nn.Module, inputs: Any) -> None:
        if self.depth == 0:
            self.start = time.perf_counter()
        self.depth += 1

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.total += time.perf_counter() - self.start


def linear_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that multiply by a matrix: ``nn.Linear``, GPT-2's ``Conv1D``, fewbit's own, and fused experts: a module
    that holds three-dimensional weights or the quantized bank of them."""
    from transformers.pytorch_utils import Conv1D

    def multiplies(module: nn.Module) -> bool:
        fused = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        fused = fused or any(isinstance(child, ExpertBank) for child in module.children())
        return fused or isinstance(module, (nn.Linear, Conv1D, QuantLinear))

    return [module for module in model.modules() if multiplies(module)]
