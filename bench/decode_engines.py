# SPDX-License-Identifier: Apache-2.0
"""Engines that decode, each in a process of its own, so that its peak memory is its own: ``python decode_engines.py
KIND MODEL OPTION THREADS`` loads one, then answers lines of JSON on stdin with lines on stdout.

    {"prefill": n}                 a new text of n tokens          -> {"wall": seconds, "processor": seconds}
    {"decode": n, "context": c}    n tokens, greedily, after c     -> the same
    {"streams": s, "decode": n, "context": c}    the same, n tokens of s texts, side by side; only where it can
    {}                             where it stands                 -> {"peak": bytes, "read": bytes a token, ...}
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from fewbit.measure.memory import peak_rss_bytes


class Engine(ABC):
    """Abstract: one text at a time."""

    read_bytes: int
    note: str
    most = 1  # texts side by side

    @abstractmethod
    def begin(self, length: int) -> None:
        """Keep the first ``length`` tokens."""

    @abstractmethod
    def feed(self, tokens: list[int]) -> int:
        """Append ``tokens``; the likeliest next one."""


class Fewbit(Engine):
    """Either engine of fewbit. ``option``: what inputs are rounded to, or ``-``; what keys and values are kept in may
    follow after a plus: ``int8/channel+int8``."""

    most = 16

    def __init__(self, model: str, option: str, threads: int) -> None:
        from fewbit.decode import open_engine
        from fewbit.decode.sampling import Sampler, Sampling

        activation, _, kv = option.partition("+")
        made = open_engine(
            model,
            activation=None if activation == "-" else activation,
            kv=kv or "float16",
            sequences=1 + self.most,
            threads=threads,
        )
        self.read_bytes = getattr(made, "read_bytes", 0)
        self.note, self._engine, self._sequence = made.why or made.name, made, made.open()
        self._greedy = Sampler(Sampling(temperature=0, seed=0), [], made.vocab_size)

    def begin(self, length: int) -> None:
        self._engine.keep(self._sequence, length)

    def feed(self, tokens: list[int]) -> int:
        return self.step([self._sequence], [tokens])[0]

    def fork(self, streams: int, length: int) -> list[int]:
        return [self._engine.fork(self._sequence, length) for _ in range(streams)]

    def step(self, streams: list[int], tokens: list[list[int]]) -> list[int]:
        """The likeliest token after each, found as ``fewbit generate`` finds it."""
        from fewbit.decode.sampling import sample

        rows = self._engine.feed_rows(list(zip(streams, tokens, strict=True)))
        return sample(rows, [self._greedy] * len(rows))

    def close(self, streams: list[int]) -> None:
        for stream in streams:
            self._engine.close(stream)


class Transformers(Fewbit):
    """torch in bfloat16, as transformers runs it. ``model``: a folder or a GGUF file."""

    def __init__(self, model: str, option: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from fewbit.decode.transformers_engine import TransformersEngine

        path, more = Path(model), {}
        if path.is_file():
            path, more = path.parent, {"gguf_file": path.name}
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, option), **more).eval()
        made = TransformersEngine(loaded, None, sequences=1 + self.most)
        head = loaded.get_output_embeddings().weight
        matrices = {p.data_ptr(): p.nbytes for p in loaded.parameters() if p.ndim == 2}
        tied = head.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
        self.read_bytes = sum(matrices.values()) - (0 if tied else loaded.get_input_embeddings().weight.nbytes)
        self.note, self._engine, self._sequence = f"torch {torch.__version__}", made, made.open()


class LlamaCpp(Engine):
    """llama.cpp through the bindings of llama-cpp-python. ``model``: a GGUF file."""

    def __init__(self, model: str, option: str, threads: int) -> None:
        import llama_cpp

        self._c = llama_cpp.llama_cpp
        self._c.llama_backend_init()
        quiet = self._c.llama_log_callback(lambda level, text, data: None)
        self._c.llama_log_set(quiet, None)
        parameters = self._c.llama_model_default_params()
        self._model = self._c.llama_model_load_from_file(model.encode(), parameters)
        context = self._c.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = 2048, 512, 512
        context.n_threads = context.n_threads_batch = threads
        self._context = self._c.llama_init_from_model(self._model, context)
        self._words = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self.read_bytes = int(self._c.llama_model_size(self._model))
        self.note, self._quiet = f"llama-cpp-python {llama_cpp.__version__}", quiet

    def begin(self, length: int) -> None:
        self._c.llama_memory_seq_rm(self._c.llama_get_memory(self._context), 0, length, -1)

    def feed(self, tokens: list[int]) -> int:
        import numpy as np

        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self._c.llama_decode(self._context, self._c.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._words,)).argmax())


KINDS = {"fewbit": Fewbit, "transformers": Transformers, "llama.cpp": LlamaCpp}


def text(length: int) -> list[int]:
    """Token ids that every vocabulary has."""
    return [7 * place % 1000 + 5 for place in range(length)]


def side_by_side(engine: Any, asked: dict[str, Any]) -> dict[str, Any]:
    streams = engine.fork(asked["streams"], asked["context"])
    tokens = list(range(5, 5 + len(streams)))
    began = time.perf_counter(), time.process_time()
    for _ in range(asked["decode"]):
        tokens = engine.step(streams, [[token] for token in tokens])
    spent = {"wall": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}
    engine.close(streams)
    return spent


def answer(engine: Engine, asked: dict[str, Any], state: dict[str, int]) -> dict[str, Any]:
    if "prefill" in asked:
        engine.begin(0)
        state["length"] = asked["prefill"]
        began = time.perf_counter(), time.process_time()
        engine.feed(text(asked["prefill"]))
    elif "decode" in asked:
        context = asked["context"]
        if state["length"] < context:
            engine.begin(0)
            engine.feed(text(context))
        engine.begin(context)
        state["length"] = context
        token = 5
        engine.feed([token])  # the threads wake up
        engine.begin(context)
        if "streams" in asked:
            return side_by_side(engine, asked)
        began = time.perf_counter(), time.process_time()
        for _ in range(asked["decode"]):
            token = engine.feed([token])
    else:
        return {"peak": peak_rss_bytes(), "read": engine.read_bytes, "note": engine.note, "base": state["base"]}
    return {"wall": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}


def main() -> None:
    kind, model, option, threads = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(int(threads))
    began = time.perf_counter()
    engine = KINDS[kind](model, option, int(threads))
    loaded = time.perf_counter() - began
    state = {"length": 0, "base": peak_rss_bytes()}
    print(json.dumps({"loaded": loaded}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line), state)), file=out, flush=True)


if __name__ == "__main__":
    main()
