# SPDX-License-Identifier: Apache-2.0
"""The native runtime as an engine: Python describes the model once and passes token ids."""

from __future__ import annotations

import ctypes as C
import weakref
from array import array
from pathlib import Path

import torch
from torch import Tensor

from fewbit import formats
from fewbit.containers.files import read_json
from fewbit.containers.shards import weight_files
from fewbit.decode import structs as S
from fewbit.decode.configs import config_of
from fewbit.decode.describe import describe
from fewbit.decode.families import Shape, shape_of
from fewbit.decode.ledger import Ledger, Parts
from fewbit.decode.source import Pages, Source, mapped
from fewbit.errors import UnsupportedError
from fewbit.kernels import native


class NativeEngine:
    """See :class:`fewbit.decode.Engine`. ``read_bytes``: of weights, that one decoded token reads."""

    name = "native"
    why: str | None = None

    def __init__(
        self,
        shape: Shape,
        source: Source,
        kv: str = "float16",
        sequences: int = 8,
        context: int | None = None,
        threads: int | None = None,
    ) -> None:
        core = native.core()
        model = describe(shape, source)
        self.vocab_size = shape.vocabulary
        self.context = min(shape.context, context or shape.context)
        self._source, self._threads, self._core = source, threads, core
        self.read_bytes = _read_bytes(shape, source)
        self._ledger = Ledger(self.vocab_size, self.context, sequences)
        try:
            self._decoder = core.decoder_new(C.addressof(model), S.KV[kv], sequences)
        except ValueError:
            found = "its arrays have other shapes than its configuration says"
            raise UnsupportedError("the native runtime for this model", found) from None
        self._close = weakref.finalize(self, core.decoder_free, self._decoder)

    @staticmethod
    def load(
        folder: Path, activation: str | None, kv: str, sequences: int, context: int | None, threads: int | None
    ) -> NativeEngine:
        """The model in ``folder``; arguments as of :func:`fewbit.decode.open_engine`.

        Raises:
            UnsupportedError: the machine, the family or a matrix is none that the runtime knows.
        """
        if not native.available():
            raise UnsupportedError("the native runtime", native.why_not() or "")
        shape = shape_of(config_of(folder))
        source = open_source(folder, activation)
        return NativeEngine(shape, source, kv, sequences, context, threads)

    def open(self) -> int:
        return self._ledger.open()

    def feed(self, parts: Parts) -> Tensor:
        self._ledger.check_feed(parts)
        ids = [array("i", tokens) for _, tokens in parts]
        addressed = tuple(
            (sequence, held.buffer_info()[0], len(held)) for (sequence, _), held in zip(parts, ids, strict=True)
        )
        logits = torch.empty(len(parts), self.vocab_size)
        threads = self._threads or torch.get_num_threads()
        if addressed:
            self._core.decoder_feed(self._decoder, addressed, logits.data_ptr(), threads)
        self._ledger.feed(parts)
        return logits

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


def _read_bytes(shape: Shape, source: Source) -> int:
    """All matrices but the embedding, of which a row is read, and of the experts those that are chosen."""
    tied = not source.has("lm_head") or "tied_to" in source.modules.get("lm_head", {})
    total = 0
    for name, size in source.sizes.items():
        if ".experts." in name:
            experts = next(layer.experts for layer in shape.layers if layer.experts)
            total += size * shape.experts_per_token // experts
        elif tied or name != "model.embed_tokens":
            total += size
    return total


def open_source(folder: Path, activation: str | None) -> Source:
    """The arrays of ``folder``: mapped, or, where its names differ from those of transformers' module tree, as
    transformers loads them."""
    rounding = None if activation is None else formats.parse(activation)
    quantization = read_json(folder / "config.json").get("quantization_config")
    modules = quantization.get("modules", {}) if isinstance(quantization, dict) else {}
    files = [mapped(file) for file in weight_files(folder)]
    tensors = {name: tensor for _, held in files for name, tensor in held.items()}
    fused = any(".experts." in name and name.endswith(".weight") for name in tensors)
    if fused:
        from fewbit.decode.transformers_engine import load_plain

        tensors = load_plain(folder).state_dict()
    return Source(tensors, modules, rounding, Pages(*(pages for pages, _ in files)))
