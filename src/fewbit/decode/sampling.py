# SPDX-License-Identifier: Apache-2.0
"""Which token comes next: what may be asked for, the draw in native code, and its slow definition.

The order is bias, penalties, temperature, top-k, top-p, min-p, as transformers applies them; each is spelt out in
``csrc/include/fewbit_sample.h``. A draw depends on the logits of its own sequence, the seed and the position in the
text alone, so that one seed gives one text whatever runs beside it.
"""

from __future__ import annotations

import ctypes as C
import dataclasses
import math
import secrets
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from fewbit.errors import InputError, SpecError
from fewbit.kernels import native

if TYPE_CHECKING:
    from torch import Tensor

    Row = memoryview[float] | Tensor
    """Logits (vocab), float32 and contiguous."""

MOST_STOPS = 16
MOST_LOGPROBS = 20
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
_WHOLE: dict[str, tuple[int, int]] = {
    "top_k": (0, 1 << 31),
    "seed": (-(1 << 63), (1 << 64) - 1),
    "max_tokens": (0, 1 << 31),
    "logprobs": (0, MOST_LOGPROBS),
}


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, and when to stop.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the ``top_k`` likeliest; 0 is all of them.
        top_p: only the fewest likeliest whose probabilities reach ``top_p`` together.
        min_p: only those at least ``min_p`` times as likely as the likeliest.
        repetition_penalty: positive logits of tokens in the prompt or the text are divided by it, negative multiplied.
        frequency_penalty: taken off a logit for each time that its token is in the text.
        presence_penalty: taken off the logits of tokens in the text.
        seed: same seed, same text. None draws one.
        logit_bias: token -> what is added to its logit, -100 to 100.
        max_tokens: tokens to add at most; 0 only reads the prompt, None is what the context has room for.
        stop: texts that end the generation and are not shown.
        ignore_eos: go on where the model would end.
        logprobs: how many of the likeliest tokens to report beside the one taken; None reports nothing.

    Raises:
        SpecError: a number is none, or out of its range; the text names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            _check(name, getattr(self, name), least, most, whole=False)
        for name, (least, most) in _WHOLE.items():
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), least, most, whole=True)
        for token, bias in self.logit_bias.items():
            _check("a token of logit_bias", token, 0, 1 << 31, whole=True)
            _check(f"logit_bias of token {token}", bias, -100, 100, whole=False)
        stop: object = self.stop  # a text alone would be taken for as many as it has letters
        wrong = not isinstance(stop, tuple | list) or not all(isinstance(text, str) and text for text in stop)
        if wrong or len(self.stop) > MOST_STOPS:
            works = f"a tuple of at most {MOST_STOPS} texts, none of them empty"
            raise SpecError(f"stop {self.stop!r}"[:200], "", works)

    def seeded(self) -> Sampling:
        """The same with a seed, drawn where there is none."""
        return self if self.seed is not None else dataclasses.replace(self, seed=secrets.randbits(63))


def _check(name: str, value: object, least: float, most: float, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        range = f"whole number from {least} to {most}" if whole else f"number from {least:g} to {most:g}"
        raise SpecError(f"{name} {value!r}"[:200], "", f"a {range} would work")


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities, before anything of :class:`Sampling`."""

    taken: float
    top: tuple[tuple[int, float], ...]
    """(token, logarithm), likeliest first."""


class Sampler:
    """The draws of one text: what was asked, and the tokens so far.

    Args:
        branch: tells texts apart that share a seed, as the choices of one request do.

    Raises:
        SpecError: ``logit_bias`` names a token beyond the vocabulary.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, branch: int = 0) -> None:
        self.sampling = sampling.seeded()
        self.branch = branch
        self.position = 0
        beyond = max(sampling.logit_bias, default=-1)
        if beyond >= vocab_size:
            raise SpecError(f"logit_bias of token {beyond}", f"the vocabulary has {vocab_size}", "a smaller number")
        s = self.sampling
        self._counted = (s.repetition_penalty, s.frequency_penalty, s.presence_penalty) != (1, 0, 0)
        first = list(dict.fromkeys(prompt)) if self._counted else []
        self._slot = {token: slot for slot, token in enumerate(first)}
        self._seen = array("i", first)
        self._counts = array("i", [0] * len(first))
        self._biased = array("i", s.logit_bias)
        self._bias = array("f", s.logit_bias.values())

    def take(self, token: int) -> None:
        """``token`` was added to the text."""
        self.position += 1
        if not self._counted:
            return
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._seen):
            self._seen.append(token)
            self._counts.append(0)
        self._counts[slot] += 1

    @property
    def seen(self) -> tuple[array[int], array[int]]:
        """Different tokens of prompt and text, and how often each is in the text: (n) each; empty where no
        penalty asks for them."""
        return self._seen, self._counts

    @property
    def biases(self) -> tuple[array[int], array[float]]:
        """Tokens (n) and what is added to their logits (n)."""
        return self._biased, self._bias

    def as_native(self, row: memoryview[float]) -> native.Draw:
        """The arguments of the native draw from ``row`` (vocab) float32; pointers live as long as row, and as self
        until the next token."""
        s, (seen, counts) = self.sampling, self.seen
        return (
            _address(row),
            len(row),
            s.temperature,
            s.top_p,
            s.min_p,
            s.repetition_penalty,
            s.frequency_penalty,
            s.presence_penalty,
            s.top_k,
            seen.buffer_info()[0],
            counts.buffer_info()[0],
            len(seen),
            self._biased.buffer_info()[0],
            self._bias.buffer_info()[0],
            len(self._bias),
            _key(s),
            self.position,
            self.branch,
        )


def _key(sampling: Sampling) -> int:
    assert sampling.seed is not None
    return sampling.seed & ((1 << 64) - 1)


def sample(logits: Iterable[Row], samplers: Sequence[Sampler]) -> list[int | InputError]:
    """A token of each row, or the error of a row that holds no distribution: NaN, +infinity, or -infinity alone.

    Args:
        logits: (samplers, vocab) float32, rows contiguous; overwritten.
    """
    rows = [_numbers(row) for row in logits]
    if native.available():
        tokens = array("i", bytes(4 * len(samplers)))
        draws = tuple(sampler.as_native(row) for sampler, row in zip(samplers, rows, strict=True))
        native.core().sample(draws, tokens.buffer_info()[0], native.threads())
        drawn = tokens.tolist()
    else:
        drawn = [sample_reference(row, sampler) for row, sampler in zip(rows, samplers, strict=True)]
    return [_broken() if token < 0 else token for token in drawn]


def _broken() -> InputError:
    return InputError("the next token", "the model's logits are not finite", "check the model with fewbit eval")


def logprobs(row: Row, token: int, count: int) -> Logprobs:
    """The model's logarithm of the probability of ``token`` and of the ``count`` likeliest, from ``row`` (vocab)."""
    if not native.available():
        return logprobs_reference(row, token, count)
    numbers = _numbers(row)
    top = array("i", bytes(4 * min(count, len(numbers))))
    log_sum = native.core().likeliest(_address(numbers), len(numbers), len(top), top.buffer_info()[0])
    return Logprobs(numbers[token] - log_sum, tuple((t, numbers[t] - log_sum) for t in top))


def logprobs_reference(row: Row, token: int, count: int) -> Logprobs:
    """The definition of :func:`logprobs`, by sorting."""
    import numpy as np  # 15 MiB that only the definitions need

    x = np.asarray(row, dtype=np.float64)
    logs = x - x.max()
    logs -= math.log(np.exp(logs).sum())
    top = np.argsort(-logs, kind="stable")[:count]  # of equals the lower token goes first
    return Logprobs(float(logs[token]), tuple(zip(top.tolist(), logs[top].tolist(), strict=True)))


def _numbers(row: Row) -> memoryview[float]:
    return cast("memoryview[float]", row if isinstance(row, memoryview) else row.numpy().data)


def _address(row: memoryview[float]) -> int:
    return C.addressof(C.c_float.from_buffer(row))


def sample_reference(row: Row, sampler: Sampler) -> int:
    """The definition in float64, by sorting; -1 where ``row`` (vocab) holds no distribution. Slow."""
    import numpy as np

    s, x = sampler.sampling, np.asarray(row).astype(np.float64)
    tokens, bias = (np.asarray(values) for values in sampler.biases)
    x[tokens] += bias
    seen, counts = (np.asarray(values) for values in sampler.seen)
    logits = np.where(x[seen] > 0, x[seen] / s.repetition_penalty, x[seen] * s.repetition_penalty)
    x[seen] = logits - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)
    if not (x < math.inf).all() or not (x > -math.inf).any():
        return -1
    order = np.argsort(-x, kind="stable")  # of equals the lower token goes first
    if s.temperature == 0:
        return int(order[0])
    kept = order[: s.top_k] if s.top_k else order
    p = np.exp((x[kept] - x[order[0]]) / s.temperature)
    p /= p.sum()
    enough = p.cumsum() - p < s.top_p
    enough[0] = True
    enough &= p >= s.min_p * p[0]
    kept, p = kept[enough], p[enough]
    by_token = np.argsort(kept)
    ends = p[by_token].cumsum()
    at = int(np.searchsorted(ends, uniform(_key(s), sampler.position, sampler.branch) * ends[-1], side="right"))
    return int(kept[by_token[min(at, len(ends) - 1)]])


def uniform(seed: int, position: int, branch: int) -> float:
    """In [0, 1): the first 53 bits of Philox4x32-10 with key ``seed`` and counter (position, branch).

    >>> uniform(0, 0, 0).hex()
    '0x1.989fa35785a70p-2'
    """
    mask = (1 << 32) - 1
    a, b, c, d = position & mask, position >> 32, branch, 0
    key0, key1 = seed & mask, seed >> 32
    for _ in range(10):
        even, odd = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (odd >> 32) ^ b ^ key0, odd & mask, (even >> 32) ^ d ^ key1, even & mask
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return float(((a << 32 | b) >> 11) * 2.0**-53)
