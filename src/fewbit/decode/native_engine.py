# SPDX-License-Identifier: Apache-2.0
"""The native runtime as an engine: it is given the struct of a model once, and token ids. Nothing here needs torch."""

from __future__ import annotations

import warnings
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.decode import structs as S
from fewbit.decode.ledger import Ledger, Parts
from fewbit.decode.opened import Model, StaleError, open_image
from fewbit.errors import UnsupportedError
from fewbit.kernels import native

if TYPE_CHECKING:
    from torch import Tensor


class NativeEngine:
    """See :class:`fewbit.decode.Engine`. ``read_bytes``: of weights, that one decoded token reads."""

    name = "native"
    why: str | None = None

    def __init__(
        self,
        model: Model,
        kv: str = "float16",
        sequences: int = 8,
        context: int | None = None,
        threads: int | None = None,
    ) -> None:
        core = native.core()
        self.model, self.vocab_size, self.read_bytes = model, model.vocab_size, model.read_bytes
        self.context = min(model.context, context or model.context)
        self._threads, self._core = threads, core
        self._ledger = Ledger(self.vocab_size, self.context, sequences)
        # Of feed_rows, used again: fresh memory of this size costs as much as the draw.
        self._logits: array[float] = array("f")
        try:
            self._decoder = core.decoder_new(model.address, S.KV[kv], sequences)
        except ValueError:
            found = "its arrays have other shapes than its configuration says"
            raise UnsupportedError("the native runtime for this model", found) from None
        self._close = weakref.finalize(self, core.decoder_free, self._decoder)

    @staticmethod
    def load(
        folder: Path, activation: str | None, kv: str, sequences: int, context: int | None, threads: int | None
    ) -> NativeEngine:
        """The model in ``folder``, as its image describes it where there is one, else as torch makes it; arguments as
        of :func:`fewbit.decode.open_engine`.

        Raises:
            UnsupportedError: the machine, the family or a matrix is none that the runtime knows.
        """
        if not native.available():
            raise UnsupportedError("the native runtime", native.why_not() or "")
        try:
            model = open_image(folder, activation)
        except StaleError as error:
            model = None
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        if model is None:
            from fewbit.decode.described import described

            model = described(folder, activation)
        return NativeEngine(model, kv, sequences, context, threads)

    def open(self) -> int:
        return self._ledger.open()

    def feed(self, parts: Parts) -> Tensor:
        import torch

        logits = torch.empty(len(parts), self.vocab_size, dtype=torch.float32, device="cpu")
        self._feed(parts, logits.data_ptr())
        return logits

    def feed_rows(self, parts: Parts) -> list[memoryview[float]]:
        return self._rows(parts, len(parts), every=False)

    def feed_every(self, sequence: int, tokens: Sequence[int]) -> list[memoryview[float]]:
        return self._rows([(sequence, tokens)], len(tokens), every=True)

    def _rows(self, parts: Parts, count: int, every: bool) -> list[memoryview[float]]:
        width = self.vocab_size
        if len(self._logits) < count * width:  # a new one: rows of the old one may still be looked at
            self._logits = array("f", bytes(4 * width)) * count
        logits: memoryview[float] = memoryview(self._logits)
        self._feed(parts, self._logits.buffer_info()[0], every)
        return [logits[row * width : (row + 1) * width] for row in range(count)]

    def every_logit(self, tokens: Sequence[int]) -> Tensor:
        """Float32 (tokens, vocab_size): the logits after each of ``tokens``, a text of its own, read in chunks as a
        prompt is. Raises what :meth:`feed` and :meth:`open` do."""
        import torch

        logits = torch.empty(len(tokens), self.vocab_size, dtype=torch.float32, device="cpu")
        sequence = self.open()
        try:
            self._feed([(sequence, tokens)], logits.data_ptr(), every=True)
        finally:
            self.close(sequence)
        return logits

    def _feed(self, parts: Parts, logits: int, every: bool = False) -> None:
        """Writes logits (parts, vocab_size), one after the other, to the address ``logits``; ``every``: those after
        every token."""
        self._ledger.check_feed(parts)
        ids = [array("i", tokens) for _, tokens in parts]
        addressed = tuple(
            (sequence, held.buffer_info()[0], len(held)) for (sequence, _), held in zip(parts, ids, strict=True)
        )
        if addressed:
            self._core.decoder_feed(self._decoder, addressed, every, logits, self._threads or native.threads())
        self._ledger.feed(parts)

    def length(self, sequence: int) -> int:
        return self._ledger.length(sequence)

    def keep(self, sequence: int, length: int) -> None:
        self._ledger.keep(sequence, length)
        self._core.decoder_keep(self._decoder, sequence, sequence, length)

    def fork(self, sequence: int, length: int) -> int:
        self._ledger.check_keep(sequence, length)
        new = self._ledger.open(length)
        self._core.decoder_keep(self._decoder, sequence, new, length)
        return new

    def close(self, sequence: int) -> None:
        self._ledger.close(sequence)
        self._core.decoder_keep(self._decoder, sequence, sequence, 0)

    def nbytes(self) -> int:
        return self._core.decoder_bytes(self._decoder)
