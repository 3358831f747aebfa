# SPDX-License-Identifier: Apache-2.0
"""Bytes that gguf and compressed-tensors wrote: we read the numbers they read, and write the same bytes.

The files and the scripts that made them are in tests/golden.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit import formats, layouts
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(file: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / file, allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def read(layout: str, data: torch.Tensor, shape: tuple[int, int]) -> QTensor:
    return QTensor(formats.parse(layout), layouts.named(layout), shape, data, {})


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q4_k", "q6_k", "tq1_0", "tq2_0"])
def test_ggml(kind: str) -> None:
    arrays = golden("ggml.npz")
    data, values = arrays[f"{kind}.bytes"], arrays[f"{kind}.values"]
    tensor = read(kind, data, tuple(values.shape))
    assert torch.equal(tensor.dequantize(), values)
    assert torch.equal(tensor.repack(layouts.UNPACKED).repack(layouts.named(kind)).packed, data)
    assert torch.equal(tensor.repack(layouts.named("dense")).dequantize(), values)


def test_the_other_ternary_type_holds_the_same() -> None:
    arrays = golden("ggml.npz")
    tensor = read("tq1_0", arrays["tq1_0.bytes"], tuple(arrays["tq1_0.values"].shape))
    assert torch.equal(tensor.repack(layouts.named("tq2_0")).packed, arrays["tq2_0.bytes"])


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_bytes_that_stand_for_nothing(kind: str) -> None:
    data = golden("ggml.npz")[f"{kind}.bytes"].clone()
    data[1, 0] = 1 if kind == "tq1_0" else 255  # 1 decodes like 0, which is what ggml writes
    with pytest.raises(InputError):
        read(kind, data, (3, 512)).logical()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_compressed_tensors(bits: int, kind: str) -> None:
    prefix = f"{bits}.{kind}."
    arrays = {k.removeprefix(prefix): v for k, v in golden("compressed_tensors.npz").items() if k.startswith(prefix)}
    weight, packed = arrays.pop("weight"), arrays.pop("weight_packed")
    layout = layouts.named("compressed-tensors")
    tensor = QTensor(formats.parse(f"int{bits}/g32/{kind}"), layout, tuple(weight.shape), packed, arrays)
    assert torch.equal(tensor.dequantize(), weight)
    again = tensor.repack(layouts.named("dense")).repack(layout)
    assert torch.equal(again.packed, packed)
    assert set(again.params) == set(arrays)
    for key, value in arrays.items():
        assert torch.equal(again.params[key].to(value.dtype), value), key
