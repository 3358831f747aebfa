# SPDX-License-Identifier: Apache-2.0
"""W8A8 with one scale a matrix and one a call: planned, stored, run, and left to transformers by the decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import formats
from fewbit.containers.safetensors import open_safetensors
from fewbit.decode.engine import open_engine
from fewbit.decode.native_engine import NativeEngine
from fewbit.errors import UnsupportedError
from fewbit.kernels.reference import round_activations
from fewbit.model.layers import QuantLinear

Short = Callable[..., Any]


@torch.no_grad()
def test_one_scale_a_matrix_and_a_call(short: Short, tiny: Path, tmp_path: Path) -> None:
    made = short(tmp_path / "out", "W8A8_TENSOR", method="rtn", head="float")
    planned = fewbit.plan(tiny, "W8A8_TENSOR", head="float")
    assert planned.bits_per_weight == made.manifest["bits_per_weight"]
    assert any(
        "int8/tensor/sym, which the native runtime does not do: transformers" in told for told in planned.warnings
    )
    layers = [layer for layer in made.manifest["layers"] if layer["block"] is not None]
    assert layers and all((each["format"], each["activation"]) == ("int8/tensor/sym",) * 2 for each in layers)
    assert all(each["nbytes"] == each["shape"][0] * each["shape"][1] + 2 for each in layers)
    files = [open_safetensors(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    scales = [file.entries[name].shape for file in files for name in file.entries if name.endswith("weight_scale")]
    assert len(scales) == len(layers) and set(scales) == {(1, 1)}
    model = fewbit.load(tmp_path / "out", dtype=torch.float32)
    module = next(each for each in model.modules() if isinstance(each, QuantLinear))
    assert module.prepared.kernel.startswith("int8_linear")
    x = torch.randn(2, 9, module.shape[1], generator=torch.Generator().manual_seed(0))
    rounded = round_activations(x, formats.parse("int8/tensor")).double()
    expected = rounded @ module.weight_of().dequantize().double().T  # type: ignore[union-attr]
    assert torch.allclose(module(x).double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_decoder_leaves_it_to_transformers_and_says_why(short: Short, tmp_path: Path) -> None:
    short(tmp_path / "out", "W8A8_TENSOR", method="rtn")
    with pytest.raises(UnsupportedError, match=r"one scale for all tokens of a call, .*; int8/channel, a scale"):
        NativeEngine.load(tmp_path / "out", None, "float16", 1, None, None)
    assert "int8/tensor/sym is one scale for all tokens of a call" in str(open_engine(tmp_path / "out").why)
