# SPDX-License-Identifier: Apache-2.0
"""Convolution in groups of rounded activations: which way it goes, and the bits that every way has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import ROWS, activation, raw_matrix
from test_conv import CASES, ROUNDING, case, check, definition, needs_native

from fewbit import formats, kernels
from fewbit.core.qtensor import QTensor
from fewbit.kernels import Window, conv, native


@needs_native
def test_the_ways_of_groups_are_those_documented() -> None:
    def ready(rows: int, columns: int, inputs: str) -> kernels.PreparedMatrix:
        matrix = raw_matrix("affine", 4, 0, (rows, columns), torch.Generator().manual_seed(0))
        return kernels.prepare(matrix, activation=formats.parse(inputs))

    few, many = ready(64, 144, "int8/channel/sym"), ready(128, 288, "int8/channel/sym")
    assert kernels.route(few, Window((3, 3), groups=4), 1) == "windows"  # 2304 weights a group
    assert kernels.route(many, Window((3, 3), groups=2), 1) == "strips"  # 18432
    assert kernels.route(ready(120, 288, "int8/channel/sym"), Window((3, 3), groups=2), 1) == "windows"  # no tiles
    assert kernels.route(ready(64, 144, "int8/g32/sym"), Window((3, 3), groups=4), 1) == "strips"  # windows of 5 scales
    assert kernels.route(ready(60, 144, "int8/g32/sym"), Window((3, 3), groups=4), 1) == "rounded"
    assert kernels.route(ready(60, 27, "int8/g32/sym"), Window((3, 3), groups=4), 1) == "windows"
    assert kernels.route(ready(60, 27, "int8/channel/asym"), Window((3, 3), groups=4), 1) == "rounded"
    assert kernels.route(ready(60, 27, "int4/channel/sym"), Window((3, 3), groups=4), 1) == "rounded"


WINDOW_ROWS = [name for name in ROWS if name.startswith("affine")]
"""Rows that bring each instruction set of ``int8_windows_*`` along."""


@needs_native
@pytest.mark.parametrize("dtype", ROUNDING)
def test_windows_are_rounded_bit_for_bit_as_the_format_does_it(dtype: torch.dtype) -> None:
    """With small integers as weights every sum is exact, and what is left to differ is how inputs were rounded."""
    generator = torch.Generator().manual_seed(3)
    inputs = formats.parse("int8/channel/sym")
    assert len(WINDOW_ROWS) >= 2
    for window, rows, shape in (entry for entry in CASES if entry[0].groups > 1):
        matrix = raw_matrix(
            "affine", 4, 0, (rows, shape[1] // window.groups * window.size[0] * window.size[1]), generator, 1.0
        )
        x = torch.randn(shape, generator=generator)
        size = 2.0 ** torch.randint(-30, 20, shape[:2], generator=generator)  # scales below and above those of float16
        # Halfway between integers, and the floats beside: the largest gives the scale, which is no power of two.
        scale = (0.5 + 0.5 * torch.rand(shape[0], 1, 1, 1, generator=generator)).half().float()
        half = torch.randint(-127, 128, shape, generator=generator) - 0.5
        half = torch.where(torch.rand(shape, generator=generator) < 0.5, half, 127.5) * scale
        beside = torch.nextafter(half, torch.randn(shape, generator=generator) * 1e4)
        for image in (
            half,
            beside,
            x,
            x * size[:, :, None, None],
            (x * 8).round() / 2,
            x * 2.0**-23,
            torch.zeros(shape),
        ):
            image = image.clamp(-6e4, 6e4).to(dtype)
            answer, _ = definition(image, matrix, window, None, inputs)
            for kernel in WINDOW_ROWS:
                prepared = kernels.prepare(matrix, kernel, inputs)
                if kernels.route(prepared, window, 1) == "windows":
                    for threads in (1, 3):
                        kernels.set_threads(threads)
                        assert torch.equal(kernels.conv2d(image, prepared, window), answer.float().to(dtype))
                    kernels.set_threads(None)


@needs_native
def test_windows_of_any_weight_agree_bit_for_bit_on_every_instruction_set() -> None:
    for window, rows, shape in (entry for entry in CASES if entry[0].groups > 1):
        found = []
        for kernel in WINDOW_ROWS:
            matrix, x, bias = case(window, rows, shape, kernel)
            prepared = kernels.prepare(matrix, kernel, formats.parse("int8/channel/sym"))
            found.append(kernels.conv2d(x, prepared, window, bias))
            last = x.to(memory_format=torch.channels_last)
            found.append(kernels.conv2d(last, prepared, window, bias))
        assert len(found) >= 4 and all(torch.equal(y, found[0]) for y in found)


@needs_native
def test_groups_of_tiles_have_the_bits_of_convolutions_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "MANY", 0)
    window, rows, shape = CASES[17]
    for kernel in (name for name in ROWS if name.startswith(("int8_linear", "int8_lut"))):
        matrix, x, bias = case(window, rows, shape, kernel)
        prepared = kernels.prepare(matrix, kernel, activation(kernel))
        assert kernels.route(prepared, window, 1) == "strips"
        y = check(kernel, x, matrix, window, bias, activation(kernel))
        codes, params = matrix.logical()
        for group in range(window.groups):
            cut, seen = slice(16 * group, 16 * (group + 1)), slice(3 * group, 3 * (group + 1))
            own = QTensor.of(matrix.format, codes[cut], {name: values[cut] for name, values in params.items()})
            alone = kernels.prepare(own, kernel, activation(kernel))
            expected = kernels.conv2d(x[:, seen], alone, replace(window, groups=1), bias[cut])
            assert torch.equal(y[:, cut], expected)
            part = prepared.tiles(group, group + 1)
            assert torch.equal(part.qtensor().dequantize(), own.dequantize())


@needs_native
def test_the_core_refuses_groups_that_cannot_be() -> None:
    x, weight, y = torch.zeros(1, 4, 3, 3), torch.zeros(4, 2), torch.zeros(1, 4, 3, 3)
    windows = (4, 3, 3, 36, 9, 3, 1, 1, 1, 1, 1, 0, 0, 1, 1, 3, 3, 4)
    flag = native.FLAGS["serial"]
    good = (windows, x.data_ptr(), 0, 1, 2, weight.data_ptr(), 4, 0, y.data_ptr(), flag, 1)
    native.core().int8_windows(*good)
    for at, value in [
        (0, (*windows[:17], 2)),
        (2, 3),
        (3, -1),
        (4, 0),
        (4, 3),
        (5, 0),
        (6, 0),
        (6, 3),
        (8, 0),
        (10, 0),
    ]:
        with pytest.raises(ValueError, match="contradict"):
            native.core().int8_windows(*good[:at], value, *good[at + 1 :])  # type: ignore[arg-type]
