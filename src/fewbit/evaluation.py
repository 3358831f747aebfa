# SPDX-License-Identifier: Apache-2.0
"""Evaluation: what quantizing cost and what it bought, the model beside its reference, on the same tokens.

Protocol, repeated in the result: the text is cut into non-overlapping windows of ``context`` tokens (each starting with
BOS where the tokenizer adds one); every token but the first ``unscored`` of a window is scored. Errors are clustered by
window (:mod:`fewbit.measure.accuracy`). Speed and memory come from a fresh process a model
(:mod:`fewbit.measure.worker`), timed in turns so that a busy machine slows both alike.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.containers import manifest as M
from fewbit.containers.files import write_json
from fewbit.core import given
from fewbit.errors import InputError, SpecError
from fewbit.measure import accuracy
from fewbit.measure.forward import Forward, through_transformers
from fewbit.measure.machine import processor
from fewbit.measure.side import Side, reference_of
from fewbit.measure.speed import Run
from fewbit.measure.tokens import Windows, cut, same_vocabulary
from fewbit.measure.worker import Child, Here

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``."""

REPEATS = 3
PROMPT = 512
"""Tokens of the prompt that prefill is timed on; fewer where the context or the text is shorter."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model; ``reference`` holds the same figures of the reference.

    Perplexity and KL are per token, KL in nats; sizes in bytes; ``linear_share`` is the share of decode time inside
    linear layers, 0 to 1; ``kernels`` counts the quantized layers by the kernel that ran them;
    ``energy_joules_per_token`` covers decode, or is the text "not measurable here: reason". What could not be measured
    is None and ``protocol["notes"]`` says why.
    """

    model: str
    perplexity: float
    perplexity_stderr: float
    bits_per_weight: float | None
    size_bytes: int
    parameters: int
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    peak_rss_bytes: int | None = None
    kl_mean: float | None = None
    kl_mean_stderr: float | None = None
    kl_p999: float | None = None
    kl_quantiles: Mapping[str, float] | None = None
    top1_agreement: float | None = None
    top1_agreement_stderr: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    linear_share: float | None = None
    energy_joules_per_token: float | str | None = None
    load_seconds: float | None = None
    dtype: str = "float32"
    kernels: Mapping[str, int] = field(default_factory=dict)
    runs: Mapping[str, list[float]] = field(default_factory=dict)
    reference: Evaluation | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for :func:`json.dumps`; a figure that is not finite becomes None."""
        value: dict[str, Any] = _finite(asdict(self))
        if value["reference"] is not None:
            for key in ("reference", "protocol", "environment"):
                del value["reference"][key]
        return value

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to ``path`` atomically."""
        write_json(Path(path), self.to_json())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    model: Any,
    reference: Any = None,
    text: str | Path | Tensor | None = None,
    context: int = 2048,
    max_tokens: int | None = None,
    decode_tokens: int = 64,
    progress: Progress | None = None,
    *,
    unscored: int = 1,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    activation: str | None = None,
    forward: Forward | None = None,
) -> Evaluation:
    """Measure ``model`` beside ``reference``.

    Args:
        model: a folder, a ``.gguf`` file, a hub id, or a loaded transformers model.
        reference: the same; None takes the source that a fewbit folder names, if it is still there.
        text: a ``.txt`` or ``.jsonl`` file, token ids (tokens,), or None for the bundled held-out text.
        context: tokens of a window, cut to what both models and the text allow.
        max_tokens: use at most this many tokens of the text.
        decode_tokens: tokens whose generation is timed; 0 leaves speed, memory and energy out.
        progress: called as ``progress(stage, done, total)``.
        unscored: leading tokens of a window that are not scored (at least 1).
        tokenizer: for models in memory; by default that of the folder.
        dtype: of the reference and of whatever the model leaves in float.
        activation: run the model, a fewbit folder, as :func:`fewbit.load` does with it.
        forward: gives the logits of the model, a fewbit folder, as :func:`fewbit.decode.forward.native_forward` does,
            in the place of transformers; speed and memory stay those of transformers.

    Neither the global random state nor the thread count changes.

    Raises:
        InputError: no such model or text, the text is too short, the vocabularies differ, ``forward`` for no folder.
        SpecError: an option is out of range. VerificationError: a model answers NaN.

    Example:
        ``fewbit.evaluate("out").to_json()["perplexity"]``
    """
    _check(text, context, max_tokens, unscored, decode_tokens)
    notes: list[str] = []
    report = progress or (lambda stage, done, total: None)
    side = Side.of(model, dtype, activation)
    other = reference_of(side, dtype, notes) if reference is None else Side.of(reference, dtype)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        seen = _score(side, other, forward, (text, tokenizer, context, max_tokens, unscored), notes, report)
        gc.collect()
        prompt = seen.prompt(decode_tokens)
        timing = _time([s for s in (side, other) if s is not None], prompt, decode_tokens, notes, report)
    before = None
    if other is not None:
        before = _figures(other, accuracy.summarize_reference(seen.scores), seen.facts[1], timing[1])
    return replace(
        _figures(side, accuracy.summarize(seen.scores), seen.facts[0], timing[0]),
        reference=before,
        protocol=_protocol(side, seen, unscored, len(prompt), decode_tokens, notes),
        environment=environment(),
    )


def _check(text: Any, context: int, max_tokens: int | None, unscored: int, decode_tokens: int) -> None:
    given.optional("the text", text, (str, Path, Tensor), "a .txt or .jsonl file, or token ids (tokens,)")
    numbers = {"context": context, "unscored": unscored, "decode_tokens": decode_tokens}
    for name, number in (numbers | {"max_tokens": max_tokens or 0}).items():
        given.kind(name, number, int, "a number of tokens")
    if context < 2 or not 1 <= unscored < context or decode_tokens < 0:
        raise SpecError(
            f"evaluate with context={context}, unscored={unscored}, decode_tokens={decode_tokens}",
            "out of range",
            "context >= 2, 1 <= unscored < context, decode_tokens >= 0",
        )


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the accuracy pass leaves: scores a window, and size facts of each side."""

    windows: Windows
    scores: list[accuracy.Scores]
    facts: list[dict[str, Any]]
    limit: int | None
    engine: str

    def prompt(self, decode_tokens: int) -> Tensor:
        """(tokens,) the beginning of the text, short enough that prompt and generated tokens fit the model."""
        room = PROMPT if self.limit is None else self.limit - decode_tokens - 1
        if room < 1:
            raise SpecError(f"decode_tokens={decode_tokens}", f"the model has {self.limit} positions", "ask for fewer")
        return self.windows.ids.reshape(-1)[: min(PROMPT, room)]


def _score(
    side: Side,
    other: Side | None,
    given: Forward | None,
    request: tuple[Any, Any, int, int | None, int],
    notes: list[str],
    report: Progress,
) -> _Seen:
    if given is not None and not side.manifest:
        raise InputError("logits computed otherwise", "the model is no fewbit folder", "leave forward out")
    text, tokenizer, context, max_tokens, unscored = request
    report("load", 0, 2)
    model = None if given is not None else side.open()
    original = None if other is None else other.open()
    forward = given or through_transformers(model)
    reference = None if original is None else through_transformers(original)
    report("load", 2, 2)
    contexts = (forward.context, None if reference is None else reference.context)
    limit = min((n for n in contexts if n is not None), default=None)
    if limit is not None and limit < context:
        notes.append(f"context cut from {context} to the {limit} positions of the model")
        context = limit
    if not isinstance(text, Tensor):
        tokenizer = _tokenizer(side, other, tokenizer, notes)
    windows = cut(tokenizer, text, context, max_tokens, unscored)
    if windows.ids.shape[1] < context:
        notes.append(f"the text is short: windows of {windows.ids.shape[1]} tokens instead of {context}")
    scores = []
    for number, ids in enumerate(windows.ids):
        report("score", number, len(windows.ids))
        expected = None if reference is None else reference.logits(ids)
        logits = forward.logits(ids)
        if expected is not None and expected.shape != logits.shape:
            raise InputError(
                f"compare {side.name} with its reference",
                f"their vocabularies hold {logits.shape[-1]} and {expected.shape[-1]} tokens",
                "give the model it was made from",
            )
        scores.append(accuracy.score(logits, ids.to(logits.device), expected, unscored))
    report("score", len(windows.ids), len(windows.ids))
    facts = [_facts(s, m, notes) for s, m in ((side, model), (other, original)) if s is not None]
    return _Seen(windows, scores, facts, limit, forward.about)


def _tokenizer(side: Side, other: Side | None, given: Any, notes: list[str]) -> Any:
    chosen = given or side.tokenizer() or (None if other is None else other.tokenizer())
    if chosen is None:
        raise InputError(
            f"evaluate {side.name}", "a model in memory has no tokenizer", "pass tokenizer= or token ids as text"
        )
    theirs = None
    try:
        theirs = None if other is None else other.tokenizer()
    except InputError:
        notes.append("the reference has no tokenizer: only the size of its vocabulary was compared")
    if theirs is not None and not same_vocabulary(chosen, theirs):
        raise InputError(
            f"compare {side.name} with its reference",
            "their tokenizers give different ids for the same text",
            "give the model it was made from",
        )
    return chosen


def _facts(side: Side, model: Any, notes: list[str]) -> dict[str, Any]:
    found = side.size(model)
    notes.append(f"bits per weight of {side.short}: {found.counted}")
    return {
        "bits_per_weight": found.bits_per_weight if math.isfinite(found.bits_per_weight) else None,
        "size_bytes": found.size_bytes,
        "parameters": side.parameters(model),
    }


def _time(
    sides: list[Side], prompt: Tensor, decode_tokens: int, notes: list[str], report: Progress
) -> list[dict[str, Any]]:
    """Figures of speed, memory and energy a side; one timed run a side in turns, medians over the turns."""
    if decode_tokens == 0:
        notes.append("decode_tokens=0: speed, memory and energy are not measured")
        return [{} for _ in sides]
    subjects: list[Child | Here] = []
    steps = REPEATS + 2
    try:
        for side in sides:
            subjects.append(side.subject(prompt, decode_tokens))
            if isinstance(subjects[-1], Here):
                notes.append(f"{side.short} was measured in this process: its peak memory includes all else in it")
        runs: list[list[Run]] = [[] for _ in sides]
        for turn in range(REPEATS + 1):
            report("time", turn, steps)
            for subject, taken in zip(subjects, runs, strict=True):
                taken.append(subject.run())
        report("time", steps - 1, steps)
        shares = [subject.linear_share() for subject in subjects]
        ends = [subject.finish() for subject in subjects]
    finally:
        for subject in subjects:
            subject.close()
    report("time", steps, steps)
    return [_timing(taken[1:], share, end) for taken, share, end in zip(runs, shares, ends, strict=True)]


def _timing(runs: list[Run], share: float | None, end: dict[str, Any]) -> dict[str, Any]:
    prefill = [run.prefill_tokens_per_s for run in runs]
    decode = [run.decode_tokens_per_s for run in runs]
    joules = [run.joules_per_token for run in runs if run.joules_per_token is not None]
    return {
        "prefill_tokens_per_s": statistics.median(prefill),
        "decode_tokens_per_s": statistics.median(decode),
        "peak_rss_bytes": end["peak_rss_bytes"],
        "linear_share": share,
        "energy_joules_per_token": statistics.median(joules) if joules else end["energy"],
        "load_seconds": end["load_seconds"],
        "kernels": end["kernels"],
        "runs": {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode},
    }


def _figures(side: Side, accurate: dict[str, Any], facts: dict[str, Any], timing: dict[str, Any]) -> Evaluation:
    return Evaluation(model=side.name, dtype=str(side.dtype).removeprefix("torch."), **accurate, **facts, **timing)


def _protocol(
    side: Side, seen: _Seen, unscored: int, prompt_tokens: int, decode_tokens: int, notes: list[str]
) -> dict[str, Any]:
    windows, context = seen.windows.ids.shape
    calibration = side.manifest.get("calibration") or {}
    if side.activation is not None:
        notes.append(f"inputs of linear layers were rounded to {side.activation}")
    if side.path is not None and (changed := M.edited(side.path, side.manifest)):
        notes.append(f"changed since {side.short} was written: {', '.join(changed)}")
    if calibration.get("source") == seen.windows.source:
        notes.append("WARNING: this text also calibrated the model, so the figures flatter it")
    many = windows > 1
    return {
        "text": seen.windows.source,
        "tokens_sha256": seen.windows.sha256,
        "context": context,
        "windows": windows,
        "tokens_scored": windows * (context - unscored),
        "unscored_per_window": unscored,
        "bos": seen.windows.bos,
        "engine": seen.engine,
        "perplexity": "exp of the mean negative log-likelihood over non-overlapping windows; "
        f"every token of a window but the first {unscored} is scored",
        "stderr": "clustered by window, because tokens of one window are dependent" if many else
        "per token, as if tokens were independent: one window only, so the true error is larger",
        "kl": "KL(reference || model) per token in nats, float32 log-softmax over the whole vocabulary; "
        "differences below about 1e-6 are rounding",
        "speed": f"transformers generate, greedy, batch 1: prompt of {prompt_tokens} tokens, {decode_tokens} decode "
        f"steps, median of {REPEATS} after a warm-up, model and reference in turns",
        "peak_rss": "largest resident set of a process that loads the model and generates, mapped weights included",
        "notes": notes,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Hardware and versions: what a figure needs beside it to mean anything."""
    try:
        version = importlib.metadata.version("fewbit")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "fewbit": version,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
