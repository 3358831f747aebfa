# SPDX-License-Identifier: Apache-2.0
"""How fast and how exact are quantized convolutions beside torch's float ones, what do they hold, and what do whole
networks lose?

``python bench/conv.py [--threads N] [--network 20 ...] [--images N] [--json FILE]``

Layers: every row of a table is measured in the same loop, one call of each in turn; medians. On one thread it is the
thread's own CPU time, so that other work on the machine counts less, else wall time. The error is the norm of the
difference to float64 (of the very weight that the row holds, on the activations as they came) over the norm of the
answer. "held" are the bytes of windows that exist at a time, "unfolded" those of all windows.
With --fallback, groups with rounded inputs also go the way "rounded" (rows with a star), which empties the cache for
the rows after it.

Networks: top-1 of the CIFAR-10 test images by ResNets of which every convolution is rounded to nearest, one scale an
output channel; rows "x int8" round every window to int8. Needs Pillow, and the folder of assets beside this checkout.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import conv2d

import cifar_resnets
from fewbit import formats, kernels, methods
from fewbit.kernels import Window, conv, native
from timing import interleaved

ONE = Window((1, 1))
THREE = Window((3, 3), padding=(1, 1))
# (images, inputs, height and width, outputs, window): of ResNets for CIFAR and ImageNet, ResNeXt, AlexNet, MobileNets.
LAYERS: list[tuple[int, int, int, int, Window]] = [
    (1, 3, 224, 64, Window((7, 7), (2, 2), (3, 3))),
    (1, 64, 56, 64, THREE),
    (1, 256, 14, 256, THREE),
    (1, 512, 7, 512, THREE),
    (1, 512, 4, 512, THREE),
    (8, 256, 14, 256, THREE),
    (16, 16, 32, 16, THREE),
    (16, 64, 8, 64, THREE),
    (1, 256, 28, 1024, ONE),
    (1, 128, 28, 128, Window((3, 3), padding=(1, 1), groups=32)),
    (1, 512, 14, 512, Window((3, 3), padding=(1, 1), groups=32)),
    (1, 256, 28, 256, Window((3, 3), padding=(1, 1), groups=2)),
    (1, 576, 14, 576, Window((3, 3), padding=(1, 1), groups=576)),
    (1, 144, 56, 144, Window((3, 3), (2, 2), (1, 1), groups=144)),
    (1, 240, 28, 240, Window((5, 5), padding=(2, 2), groups=240)),
]
SCHEMES = (("int8", None), ("int4", None), ("int8", "int8"), ("int4", "int8"))
Row = dict[str, Any]


def spelling(name: str | None) -> str | None:
    return None if name is None else f"{name}/channel/sym"


def windows_kernel(row: str) -> str:
    """The kernel of windows on the instruction set of a row of the table."""
    isa = row.rpartition("_")[2]
    return f"int8_windows_{'avx512' if isa.startswith('avx512') else isa.removesuffix('dot')}"


def fallback(x: Tensor, prepared: kernels.PreparedMatrix, window: Window) -> Tensor:
    """The way "rounded", whichever :func:`kernels.route` would take."""
    multiply = conv._rounded(prepared, window.groups)
    return conv._strips(x, window, prepared.shape[0], lambda strip: multiply(strip, None))


def rows_of(x: Tensor, weight: Tensor, window: Window, slow: bool) -> tuple[list[Row], list[Callable[[], object]]]:
    """What is measured on one layer, and how to call it. ``slow``: the fallback of groups as well."""
    arguments = (window.stride, window.padding, window.dilation, window.groups)
    positions = x.shape[0] * window.out(x)[0] * window.out(x)[1]
    width = x.shape[1] * window.size[0] * window.size[1]
    rows: list[Row] = [{"name": "torch float32", "route": "torch", "kernel": "torch", "held": 0}]
    answer = conv2d(x.double(), weight.double(), None, *arguments)
    rows[0]["relative_error"] = float((conv2d(x, weight, None, *arguments) - answer).norm() / answer.norm())
    calls: list[Callable[[], object]] = [lambda: conv2d(x, weight, None, *arguments)]
    for bits, inputs in SCHEMES:
        matrix = methods.rtn(weight.reshape(weight.shape[0], -1), formats.parse(str(spelling(bits))))
        prepared = kernels.prepare(matrix, activation=formats.parse(str(spelling(inputs))) if inputs else None)
        route = kernels.route(prepared, window, positions)
        exact = conv2d(x.double(), matrix.dequantize().double().reshape(weight.shape), None, *arguments)
        error = float((kernels.conv2d(x, prepared, window) - exact).norm() / exact.norm())
        strips = 4 * max(width, min(conv.UNFOLDED // width, positions) * width)
        held = 0 if route in ("direct", "windows") else strips
        name = bits if inputs is None else f"{bits} x {inputs}"
        kernel = {"strips": prepared.kernel, "windows": windows_kernel(prepared.kernel)}.get(route, "torch")
        rows.append({"name": name, "route": route, "kernel": kernel, "held": held, "relative_error": error})
        calls.append(lambda prepared=prepared: kernels.conv2d(x, prepared, window))  # type: ignore[misc]
        if slow and inputs is not None and window.groups > 1:
            rows.append(rows[-1] | {"name": f"{name} *", "route": "rounded", "kernel": "torch", "held": strips})
            calls.append(lambda prepared=prepared: fallback(x, prepared, window))  # type: ignore[misc]
    for row in rows:
        row |= {"x": list(x.shape), "weight": list(weight.shape), "window": str(window)}
        row |= {"unfolded": 4 * width * positions, "operations": 2 * positions * weight.numel()}
    return rows, calls


@torch.no_grad()
def layers(arguments: argparse.Namespace, console: Console) -> list[Row]:
    columns = ("", "route", "kernel", "ms", "GOPS", "x torch", "held kB", "unfolded kB", "error")
    every: list[Row] = []
    for images, inputs, side, outputs, window in LAYERS:
        x = torch.randn(images, inputs, side, side)
        if arguments.channels_last:
            x = x.to(memory_format=torch.channels_last)
        rows, calls = rows_of(
            x, torch.randn(outputs, inputs // window.groups, *window.size), window, arguments.fallback
        )
        clock = time.thread_time if arguments.threads == 1 else time.perf_counter
        timed = interleaved([[call] for call in calls], arguments.seconds, 0.0, False, clock, least=5)
        for row, times in zip(rows, timed, strict=True):
            row |= {"seconds": statistics.median(times), "seconds_least": min(times), "calls": len(times)}
        table = Table(title=f"x {tuple(x.shape)}, {outputs} outputs, {window}, {arguments.threads} threads")
        for name in columns:
            table.add_column(name, justify="left" if name in columns[:3] else "right")
        for row in rows:
            table.add_row(
                *(str(row[name]) for name in ("name", "route", "kernel")),
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['operations'] / row['seconds'] / 1e9:.0f}",
                f"{rows[0]['seconds'] / row['seconds']:.2f}",
                f"{row['held'] / 1e3:.0f}",
                f"{row['unfolded'] / 1e3:.0f}",
                f"{row['relative_error']:.1e}",
            )
        console.print(table)
        every += rows
    return every


def networks(arguments: argparse.Namespace, console: Console) -> list[Row]:
    images, labels = cifar_resnets.test_images(arguments.assets)
    images, labels = images[: arguments.images], labels[: arguments.images]
    table = Table(title=f"CIFAR-10 top-1 of {len(labels)} test images, {arguments.threads} threads")
    for name in ("network", "convolutions", "top-1 %", "CPU s"):
        table.add_column(name, justify="right" if name in ("top-1 %", "CPU s") else "left")
    rows: list[Row] = []
    for depth in arguments.network:
        for bits, inputs in ((None, None), *SCHEMES):
            model = cifar_resnets.network(depth, arguments.assets)
            if bits is not None:
                cifar_resnets.quantize(model, str(spelling(bits)), spelling(inputs))
            start = time.process_time()
            top1 = cifar_resnets.accuracy(model, images, labels)
            name = "float32" if bits is None else bits if inputs is None else f"{bits} x {inputs}"
            seconds = time.process_time() - start
            rows.append({"network": f"ResNet-{depth}", "convolutions": name, "top1": top1, "cpu_seconds": seconds})
            table.add_row(f"ResNet-{depth}", name, f"{100 * top1:.2f}", f"{seconds:.1f}")
    console.print(table)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3, help="measuring time a layer; 0 leaves layers out")
    parser.add_argument("--channels-last", action="store_true", help="of the images that layers get")
    parser.add_argument("--fallback", action="store_true", help='measure the way "rounded" as well')
    parser.add_argument("--network", action="append", type=int, default=[], choices=(20, 32, 44, 56))
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--assets", type=Path, default=cifar_resnets.ASSETS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    kernels.set_threads(arguments.threads)
    found = {"layers": layers(arguments, console) if arguments.seconds else []}
    found["networks"] = networks(arguments, console) if arguments.network else []
    if arguments.json:
        about = {"command": sys.argv, "threads": arguments.threads, "torch": torch.__version__, "isas": native.isas()}
        about |= {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"about": about, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
