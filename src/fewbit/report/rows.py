# SPDX-License-Identifier: Apache-2.0
"""What a report says, before anything is drawn: the rows of the before/after table and the verdict.

Input is the plain data of ``Evaluation.to_json()``; the terminal, the model card and the HTML page print the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fewbit.report import numbers as N

Figures = Mapping[str, Any]
Tone = Literal["good", "even", "bad", "plain"]

CLOSENESS = (
    (0.005, "practically the same model", "good"),
    (0.02, "very close to the original", "good"),
    (0.06, "close to the original", "even"),
    (0.2, "noticeably different from the original", "even"),
    (1.0, "damaged", "bad"),
)
"""Words for a mean token KL below each bound, in nats. A convention of these reports, printed in them."""
BEYOND = ("broken", "bad")


@dataclass(frozen=True)
class Row:
    """One line: ``before`` is the reference. ``tone`` colours ``change``; ``note`` is a footnote or a tooltip."""

    group: str
    label: str
    before: str
    after: str
    change: str
    tone: Tone
    note: str = ""


def closeness(kl: float) -> tuple[str, Tone]:
    """Words and tone for a mean token KL."""
    for bound, words, tone in CLOSENESS:
        if kl < bound:
            return words, tone  # type: ignore[return-value]
    return BEYOND  # type: ignore[return-value]


def rows(evaluation: Figures) -> list[Row]:
    """The table, in the order in which a person asks: how good, how big, how fast."""
    before = evaluation.get("reference") or {}
    return [*_accuracy(before, evaluation), *_size(before, evaluation), *_speed(before, evaluation)]


def _accuracy(before: Figures, after: Figures) -> list[Row]:
    def perplexity(figures: Figures) -> str:
        return N.plus_minus(figures.get("perplexity"), figures.get("perplexity_stderr"))

    ratio, error = after.get("perplexity_ratio"), after.get("perplexity_ratio_stderr")
    text, tone = _perplexity_change(ratio, error)
    found = [
        Row("Accuracy", "Perplexity", perplexity(before), perplexity(after), text, tone,
            "lower is better; ± one standard error. The change is paired: both models on the same tokens.")
    ]  # fmt: skip
    kl = after.get("kl_mean")
    if kl is not None:
        words, tone = closeness(kl)
        mean = N.plus_minus(kl, after.get("kl_mean_stderr"), 3)
        found += [
            Row("Accuracy", "Token KL to the original, mean", "0", mean, words, tone, "nats; 0 is the original itself"),
            Row("Accuracy", "Token KL, 99.9th percentile", "0", N.significant(after["kl_p999"]), "", "plain",
                "one token in a thousand is further from the original than this"),
            Row("Accuracy", "Same first choice of token", "100 %", N.percent(after["top1_agreement"]), "", "plain",
                "top-1 agreement with the original"),
        ]  # fmt: skip
    return found


def _perplexity_change(ratio: float | None, error: float | None) -> tuple[str, Tone]:
    if ratio is None:
        return "", "plain"
    if abs(ratio - 1) <= 2 * (error or 0):
        return f"{N.change(ratio, error)}: within the error", "even"
    return N.change(ratio, error), "bad" if ratio > 1.02 else "even" if ratio > 1 else "good"


def _size(before: Figures, after: Figures) -> list[Row]:
    bits = N.significant(before.get("bits_per_weight")), N.significant(after.get("bits_per_weight"), 4)
    found = [
        _smaller("Size on disk", "size_bytes", before, after, "all weight files"),
        Row("Size", "Bits per weight", *bits, *_fewer(before, after, "bits_per_weight"),
            "true stored bits of the matrices, scales and zero points included"),
    ]  # fmt: skip
    if after.get("peak_rss_bytes") is not None:
        note = "largest resident memory of a process that loads the model and generates text"
        found.append(_smaller("Peak memory", "peak_rss_bytes", before, after, note))
    return found


def _smaller(label: str, key: str, before: Figures, after: Figures, note: str) -> Row:
    return Row("Size", label, N.size(before.get(key)), N.size(after.get(key)), *_fewer(before, after, key), note)


def _fewer(before: Figures, after: Figures, key: str) -> tuple[str, Tone]:
    if not before.get(key) or not after.get(key):
        return "", "plain"
    ratio = before[key] / after[key]
    if 0.98 < ratio < 1.02:
        return "the same", "even"
    if ratio > 1:
        return f"{N.significant(ratio, 2 if ratio < 10 else 3)}{N.TIMES} smaller", "good"
    return f"{N.significant(1 / ratio, 3)}{N.TIMES} LARGER", "bad"


def _speed(before: Figures, after: Figures) -> list[Row]:
    if after.get("decode_tokens_per_s") is None:
        return []
    found = []
    for key, label in (("prefill_tokens_per_s", "Prefill"), ("decode_tokens_per_s", "Decode")):
        then, now = (f"{N.significant(f.get(key))} tok/s" if f.get(key) else N.DASH for f in (before, after))
        found.append(Row("Speed", label, then, now, *faster(before, after, key), "batch 1; median of the timed runs"))
    share = "linear_share"
    if after.get(share) is not None:
        shares = N.percent(before.get(share), 0), N.percent(after[share], 0)
        note = "the only part that fewer bits can speed up"
        found.append(Row("Speed", "Decode time in linear layers", *shares, "", "plain", note))
    return [*found, _energy(before, after)]


def _energy(before: Figures, after: Figures) -> Row:
    key = "energy_joules_per_token"

    def text(figures: Figures) -> str:
        value = figures.get(key)
        return f"{N.significant(value)} J" if isinstance(value, float) else "not measurable here" if value else N.DASH

    measured = isinstance(before.get(key), float) and isinstance(after.get(key), float)
    change, tone = _fewer(before, after, key) if measured else ("", "plain")
    note = "energy counter of the processor or GPU, decode only"
    if isinstance(after.get(key), str):
        note = after[key]
    return Row("Speed", "Energy per token", text(before), text(after), change.replace("smaller", "less"), tone, note)


def faster(before: Figures, after: Figures, key: str) -> tuple[str, Tone]:
    """How much faster, honest about noise (the ranges of the timed runs overlap) and about being slower."""
    if not before.get(key) or not after.get(key):
        return "", "plain"
    ratio = after[key] / before[key]
    then, now = (f.get("runs", {}).get(key) or [f[key]] for f in (before, after))
    text = f"{N.significant(ratio)}{N.TIMES}"
    if min(now) <= max(then) and min(then) <= max(now):
        return f"{text}: no difference beyond noise", "even"
    return (f"{text} faster", "good") if ratio > 1 else (f"{text}: SLOWER", "bad")


def procedure(layer: Figures) -> str | None:
    """What was done to a layer, in order: transforms, method, tunings. ``layer`` is of a plan or a manifest."""
    if not layer.get("method"):
        return None
    steps = [step if isinstance(step, str) else _with_options(step) for step in layer.get("transforms") or []]
    tunes = [step if isinstance(step, str) else _with_options(step) for step in layer.get("tune") or []]
    return " + ".join([*steps, str(layer["method"]), *tunes])


def _with_options(step: Figures) -> str:
    given = ", ".join(f"{name}={value}" for name, value in step.items() if name != "name")
    return f"{step['name']}({given})"


@dataclass(frozen=True)
class Verdict:
    """``headline`` is one sentence; ``warnings`` must not be missed."""

    headline: str
    tone: Tone
    warnings: tuple[str, ...]


def verdict(evaluation: Figures) -> Verdict:
    """What the figures say, in a sentence."""
    before = evaluation.get("reference") or {}
    warnings = [note for note in evaluation.get("protocol", {}).get("notes", []) if "WARNING" in note]
    smaller, _ = _fewer(before, evaluation, "size_bytes")
    bits = f"{N.significant(evaluation.get('bits_per_weight'))} bits per weight"
    gains = [f"{smaller} on disk at {bits}" if smaller else bits]
    speed, speed_tone = faster(before, evaluation, "decode_tokens_per_s")
    if speed:
        gains.append(f"{speed} at decoding" if speed_tone == "good" else _DECODES[speed_tone])
    slower = [what for what, key in _SPEEDS if faster(before, evaluation, key)[1] == "bad"]
    if slower:
        warnings.append(f"Slower than the original on this machine at {' and '.join(slower)}.")
    slow = (evaluation.get("kernels") or {}).get("reference", 0)
    if slow:
        warnings.append(f"{slow} layers ran on the slow reference kernel: `fewbit doctor` says why.")
    kl = evaluation.get("kl_mean")
    if kl is None:
        warnings.append("There is no original beside it, so nothing here says how much accuracy quantizing cost.")
        return Verdict(f"{', '.join(gains)}.", "plain", tuple(warnings))
    words, tone = closeness(kl)
    costs = [f"same token picked {N.percent(evaluation['top1_agreement'], 0)} of the time"]
    if evaluation.get("perplexity_ratio") is None:
        warnings.append("The perplexity has overflowed.")
    else:
        costs.append(f"perplexity {N.change(evaluation['perplexity_ratio'])}")
    headline = f"{words[0].upper()}{words[1:]}: {', '.join(gains)}; {', '.join(costs)}."
    return Verdict(headline, tone, tuple(warnings))


_DECODES = {"bad": "decoding SLOWER here", "even": "decoding as fast as before"}
_SPEEDS = (("reading the prompt", "prefill_tokens_per_s"), ("decoding", "decode_tokens_per_s"))


def comparable(evaluations: list[Figures]) -> str | None:
    """None, or why these evaluations must not be read side by side."""
    seen = {(e.get("protocol", {}).get("tokens_sha256"), e.get("protocol", {}).get("context")) for e in evaluations}
    if len(seen) > 1:
        return "these were measured on different text or windows: their perplexities and KL do not compare"
    return None
