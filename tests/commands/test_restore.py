# SPDX-License-Identifier: Apache-2.0
"""``fewbit restore``, and ``fewbit quantize`` of what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from typer.testing import Result

import fewbit
from fewbit.containers.safetensors import open_safetensors

Command = Callable[..., Result]
SMALL = ("--samples", "4", "--context", "32")


def test_a_restored_model_is_written_and_quantized_like_any_other(
    tiny: Path, command: Command, quantized: Path, tmp_path: Path
) -> None:
    better = tmp_path / "better"
    learned = ("--rank", "2", "--steps", "3", "--batch", "2", "--lr", "0.02")
    result = command("restore", tiny, quantized, "-o", better, *learned, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert "step 3 of 3" in result.stderr and str(better) in result.stdout
    same = fewbit.restore(tiny, quantized, rank=2, steps=3, batch=2, lr=0.02, samples=4, context=32)
    files = open_safetensors(better / "model.safetensors")
    for name, parameter in same.named_parameters():
        assert name not in files.entries or torch.equal(files.get(name), parameter.detach()), name
    assert not list(tmp_path.glob("*.partial"))
    result = command("restore", tiny, quantized, "-o", better, *learned, *SMALL)
    assert result.exit_code == 3 and "--force" in result.stderr
    result = command("quantize", better, "-o", tmp_path / "out", "-f", "int4/g32", *SMALL)
    assert result.exit_code == 0, result.stderr


def test_numbers_out_of_range_are_refused(tiny: Path, command: Command, quantized: Path, tmp_path: Path) -> None:
    result = command("restore", tiny, quantized, "-o", tmp_path / "better", "--steps", "0")
    assert result.exit_code == 2 and "steps=0" in result.stderr
