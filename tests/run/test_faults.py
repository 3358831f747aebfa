# SPDX-License-Identifier: Apache-2.0
"""Seeded faults in writer, loader, kernel, disk, recipe and data: every one is caught before success is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.core.qtensor import QTensor
from fewbit.errors import CorruptFileError, FewbitError, SpecError, VerificationError
from fewbit.layouts import dense
from fewbit.recipe import Recipe, Rule
from fewbit.run import stages
from fewbit.run.events import Event

Short = Callable[..., Any]


def swapped(packed: Tensor) -> Tensor:
    return (packed >> 4) | (packed << 4)


def refused(short: Short, out: Path, kind: type[FewbitError], match: str, **more: Any) -> None:
    with pytest.raises(kind, match=match):
        short(out, **more)
    assert not out.exists(), "a faulty result got its name"


def test_nibbles_swapped_by_the_writer(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = stages.write_safetensors

    def bad(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        return good(path, {k: swapped(v) if k.endswith("_packed") else v for k, v in tensors.items()}, metadata)

    monkeypatch.setattr(stages, "write_safetensors", bad)
    refused(short, tmp_path / "out", VerificationError, "decodes to other values")


def test_nibbles_swapped_by_the_loader(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.run import verify

    good = verify.open_safetensors

    def bad(path: Path) -> Any:
        file = good(path)
        entries, get = file.entries, file.get

        class Swapping:
            def __init__(self) -> None:
                self.path, self.entries = path, entries

            def get(self, name: str) -> Tensor:
                return swapped(get(name)) if name.endswith("_packed") else get(name)

        return Swapping()

    monkeypatch.setattr(verify, "open_safetensors", bad)
    refused(short, tmp_path / "out", VerificationError, "decodes to other values")


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (lambda scale: scale.T.contiguous(), "it is torch.float16"),
        (lambda scale: scale.flip(1), "decodes to other values"),
        (lambda scale: scale.clone().fill_(float("nan")), "NaN or Inf"),
        (lambda scale: scale.float(), "it is torch.float32"),
    ],
    ids=["transposed", "reversed", "nan", "wider"],
)
def test_scales(
    short: Short,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Tensor], Tensor],
    match: str,
) -> None:
    good = stages.write_safetensors

    def bad(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        return good(
            path, {k: fault(v) if k.endswith("q_proj.weight_scale") else v for k, v in tensors.items()}, metadata
        )

    monkeypatch.setattr(stages, "write_safetensors", bad)
    refused(short, tmp_path / "out", VerificationError, match)


def test_a_kernel_with_the_wrong_group_size(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.run import solve

    good = solve.kernels.linear

    def bad(x: Tensor, qtensor: QTensor, **more: Any) -> Tensor:
        codes, params = qtensor.logical()
        halves = {
            name: values.repeat_interleave(2, 1)[:, : -(-codes.shape[1] // 16)] for name, values in params.items()
        }
        halves = {name: values.roll(1, 1) for name, values in halves.items()}
        return good(x, QTensor.of(replace(qtensor.format, block=16), codes, halves), **more)

    monkeypatch.setattr(solve.kernels, "linear", bad)
    refused(short, tmp_path / "out", VerificationError, "further from the reference")


def test_a_shard_that_disappears(short: Short, tmp_path: Path) -> None:
    def remove(event: Event) -> None:
        if event.kind == "block" and event.block == 4:
            next((tmp_path / "out.partial").glob("model-00002*")).unlink()

    refused(short, tmp_path / "out", CorruptFileError, "model-00002-of-00004.safetensors is missing", progress=remove)


def test_a_bit_that_flips_on_disk(short: Short, tmp_path: Path) -> None:
    def flip(event: Event) -> None:
        if event.kind == "block" and event.block == 4:
            path = next((tmp_path / "out.partial").glob("model-00003*"))
            content = bytearray(path.read_bytes())
            content[-100] ^= 4
            path.write_bytes(bytes(content))

    refused(short, tmp_path / "out", CorruptFileError, "model-00003.*bytes differ", progress=flip)


def test_a_layer_that_was_not_written(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = stages.write_safetensors

    def bad(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        return good(path, {k: v for k, v in tensors.items() if "up_proj" not in k}, metadata)

    monkeypatch.setattr(stages, "write_safetensors", bad)
    refused(short, tmp_path / "out", VerificationError, "up_proj.weight_.* is missing")


def test_a_norm_that_was_not_written(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = stages.write_safetensors

    def bad(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        return good(path, {k: v for k, v in tensors.items() if "input_layernorm" not in k}, metadata)

    monkeypatch.setattr(stages, "write_safetensors", bad)
    refused(short, tmp_path / "out", VerificationError, "input_layernorm")


def test_a_stale_rule(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe((Rule("re:.*\\.fc1", "int8/g32"), *Recipe.simple("int4/g32").rules))
    with pytest.raises(SpecError, match="matches no layer"):
        fewbit.quantize(tiny, recipe, out=tmp_path / "out")


def test_layouts_that_mirror_each_other_are_told_apart_by_golden_bytes() -> None:
    """A writer and a loader that swap nibbles alike are consistent; only bytes fixed in advance catch them."""
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert dense.pack_rows(codes, 4).tolist() == [[0x21, 0x43]]
    assert dense.pack_rows(torch.arange(8, dtype=torch.uint8).reshape(1, 8), 3).tolist() == [[0o210 & 0xFF, 0xC6, 0xFA]]
