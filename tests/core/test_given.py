# SPDX-License-Identifier: Apache-2.0
"""Arguments of a wrong kind, handed to every public function: each says what was asked, found, and would work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import formats, kernels, methods
from fewbit.decode import open_engine
from fewbit.errors import FewbitError, SpecError

FORMAT = formats.parse("int4/g64")
WEIGHT, X = torch.ones(16, 64), torch.ones(2, 64)
Q = methods.rtn(WEIGHT, FORMAT)


def quantize(model: Any = "no-such-folder", recipe: Any = "int4/g64", out: Any = "out", **more: Any) -> Any:
    return fewbit.quantize(model, recipe, out=out, **more)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "parse, a number": (lambda: formats.parse(4), "of type int: 4"),  # type: ignore[arg-type]
    "parse, none": (lambda: formats.parse(None), "NoneType"),  # type: ignore[arg-type]
    "parse, a list": (lambda: formats.parse(["int4"]), "of type list"),  # type: ignore[arg-type]
    "parse, bytes": (lambda: formats.parse(b"int4"), "of type bytes"),  # type: ignore[arg-type]
    "scheme": (lambda: formats.scheme(4), "of type int"),  # type: ignore[arg-type]
    "prepare, activation": (lambda: kernels.prepare(Q, activation="text"), "formats.parse"),  # type: ignore[call-overload]
    "prepare, weight": (lambda: kernels.prepare(WEIGHT), "quantized weight"),  # type: ignore[call-overload]
    "prepared, x": (lambda: kernels.prepare(Q)([1.0] * 64), "a tensor (..., 64)"),  # type: ignore[arg-type]
    "linear, turned": (lambda: fewbit.linear(Q, X), "of type Tensor"),  # type: ignore[arg-type]
    "linear, x": (lambda: fewbit.linear(X.numpy(), Q), "ndarray"),  # type: ignore[arg-type]
    "linear, bias": (lambda: fewbit.linear(X, Q, 1.0), "a tensor (16,)"),  # type: ignore[arg-type]
    "linear, activation": (lambda: fewbit.linear(X, Q, activation="int8"), "formats.parse"),  # type: ignore[arg-type]
    "embedding, ids": (lambda: kernels.embedding([1], Q), "a tensor of integers"),  # type: ignore[arg-type]
    "embedding, matrix": (lambda: kernels.embedding(torch.tensor([1]), WEIGHT), "methods.rtn"),  # type: ignore[arg-type]
    "rtn, format": (lambda: methods.rtn(WEIGHT, "int4"), "formats.parse"),  # type: ignore[arg-type]
    "rtn, weight": (lambda: methods.rtn([[1.0]], FORMAT), "(rows, columns)"),  # type: ignore[arg-type]
    "repack": (lambda: Q.repack("dense"), "layouts.named"),  # type: ignore[arg-type]
    "load": (lambda: fewbit.load(None), "a path"),  # type: ignore[arg-type]
    "engine": (lambda: open_engine(3), "a path"),  # type: ignore[arg-type]
    "engine, sequences": (lambda: open_engine("x", sequences="8"), "sequences='8'"),  # type: ignore[arg-type]
    "engine, threads": (lambda: open_engine("x", threads=-1), "threads=-1"),
    "engine, activation": (lambda: open_engine("x", activation=8), "int8/channel"),  # type: ignore[arg-type]
    "generate": (lambda: fewbit.generate(torch.nn.Linear(2, 2), "a"), "a path"),  # type: ignore[arg-type]
    "stop": (lambda: fewbit.Sampling(stop=5), "tuple"),  # type: ignore[arg-type]
    "quantize, model": (lambda: quantize(3), "loaded model"),
    "quantize, layer": (lambda: quantize(torch.nn.Linear(2, 2)), "loaded model"),
    "quantize, format": (lambda: quantize(recipe=4), "'int4/g64', or a fewbit.Recipe"),
    "quantize, out": (lambda: quantize(out=None), "a path"),
    "quantize, samples": (lambda: quantize(samples=0), "samples=0"),
    "quantize, context": (lambda: quantize(context=12.5), "context=12.5"),
    "quantize, threads": (lambda: quantize(threads="two"), "threads='two'"),
    "quantize, head": (lambda: quantize(head=8), "'int8/g64', or 'float'"),
    "quantize, options": (lambda: quantize(options=3), "names and values"),
    "quantize, transforms": (lambda: quantize(transforms="awq"), "in a list"),
    "quantize, activation": (lambda: quantize(activation=8), "int8/channel"),
    "quantize, device": (lambda: quantize(device=3), "'cpu'"),
    "quantize, seed": (lambda: quantize(seed="s"), "a whole number"),
    "quantize, calibration": (lambda: quantize(calibration=3), ".jsonl"),
    "plan": (lambda: fewbit.plan("x", 4), "fewbit.Recipe"),  # type: ignore[arg-type]
    "evaluate": (lambda: fewbit.evaluate(torch.nn.Linear(2, 2)), "loaded model"),
    "evaluate, tokens": (lambda: fewbit.evaluate("x", max_tokens="x"), "of type str: 'x'"),  # type: ignore[arg-type]
    "evaluate, context": (lambda: fewbit.evaluate("x", context="x"), "of type str: 'x'"),  # type: ignore[arg-type]
    "evaluate, text": (lambda: fewbit.evaluate("x", text=3), ".jsonl"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_a_wrong_kind_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, says = WRONG[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as told:
        call()
    assert says in str(told.value) and told.value.works


@pytest.mark.parametrize(
    "prompt",
    [None, 5, b"abc", ["abc"], [1, 2], {"role": "user"}, [{"role": "user"}], [{"role": "user", "content": None}]],
)
def test_a_prompt_of_a_wrong_kind_is_told(prompt: Any) -> None:
    from fewbit.decode.writer import _check

    with pytest.raises(FewbitError, match="a text, or messages"):
        _check(prompt)
    _check("text")
    _check([{"role": "user", "content": "text"}])
