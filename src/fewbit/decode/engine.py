# SPDX-License-Identifier: Apache-2.0
"""What generates logits: the interface, and the choice between the two that implement it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fewbit.core import given
from fewbit.errors import SpecError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


KV = ("float16", "bfloat16", "float32", "int8", "int4")
"""Formats that keys and values can be kept in."""


class Engine(Protocol):
    """A loaded model, and the sequences that it is in the middle of. Not to be called by two threads at once.

    * ``name``: "native" or "transformers". ``why``: why it is not native, else None.
    * ``vocab_size``: width of the logits. ``context``: positions that a sequence can have.
    """

    name: str
    why: str | None
    vocab_size: int
    context: int

    def open(self) -> int:
        """A new, empty sequence. Raises UnsupportedError: as many as were asked for are open."""
        ...

    def feed(self, parts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Append (sequence, tokens) pairs to their sequences in one pass; float32 (len(parts), vocab_size): the logits
        after the last token of each.

        Raises:
            InputError: a sequence is not open or comes twice, there are no tokens, an id is not of the vocabulary, or
                the sequence would outgrow the context. Nothing has been appended then.
        """
        ...

    def feed_rows(self, parts: Sequence[tuple[int, Sequence[int]]]) -> list[memoryview[float]]:
        """As :meth:`feed`, each row as memory that may be overwritten, and that the next call overwrites: the native
        runtime needs no torch for it."""
        ...

    def feed_every(self, sequence: int, tokens: Sequence[int]) -> list[memoryview[float]]:
        """Append ``tokens`` to ``sequence``; the logits after each of them, as :meth:`feed_rows` has them."""
        ...

    def length(self, sequence: int) -> int:
        """Positions of ``sequence``."""
        ...

    def keep(self, sequence: int, length: int) -> None:
        """Forget what follows the first ``length`` positions."""
        ...

    def fork(self, sequence: int, length: int) -> int:
        """A new sequence that begins with the first ``length`` positions of another."""
        ...

    def close(self, sequence: int) -> None:
        """Forget ``sequence``, whose number may be given to another one."""
        ...

    def nbytes(self) -> int:
        """Bytes that the caches of all sequences hold."""
        ...


def open_engine(
    folder: Path | str,
    *,
    activation: str | None = None,
    kv: str = "float16",
    sequences: int = 8,
    context: int | None = None,
    threads: int | None = None,
) -> Engine:
    """The model in ``folder``, in the native runtime where that knows the family and the machine, else in transformers.
    Files that a manifest names are compared with their hashes, unless the folder holds an image of the model
    (:mod:`fewbit.decode.image`): then that none has changed is seen by its size and time, and torch is not imported.

    Args:
        folder: what ``fewbit quantize`` wrote, or an unquantized Hugging Face folder.
        activation: round the inputs of linear layers, as in :func:`fewbit.load`.
        kv: what keys and values are kept in, one of :data:`KV`; that of transformers keeps the model's dtype.
        sequences: how many may be open at once.
        context: positions of a sequence at most; None and more than the model has: as many as the model has.
        threads: of the kernels; None follows ``torch.get_num_threads()`` where torch is imported, else all cores.

    Raises:
        SpecError: ``kv`` or ``activation`` is none, or an argument is of another kind.
        InputError, CorruptFileError: as :func:`fewbit.load`.
    """
    limits = {"context": context, "threads": threads}
    check_kv(kv)
    folder = given.place("the model", folder)
    given.optional("activation", activation, str, "the spelling of a format, for example 'int8/channel'")
    given.whole(1, sequences=sequences, **{name: n for name, n in limits.items() if n is not None})
    from fewbit.decode.native_engine import NativeEngine

    try:
        return NativeEngine.load(folder, activation, kv, sequences, context, threads)
    except UnsupportedError as error:
        why = str(error)
    from fewbit.decode.transformers_engine import TransformersEngine

    return TransformersEngine.load(folder, why, activation, sequences, context, threads)


def check_kv(kv: str) -> None:
    """Raises SpecError unless ``kv`` is one of :data:`KV`."""
    if kv not in KV:
        raise SpecError(f"kv {kv!r}", "", f"one of {', '.join(KV)}")
