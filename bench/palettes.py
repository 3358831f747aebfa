# SPDX-License-Identifier: Apache-2.0
"""What a palette of one layer costs here and in coremltools: processor seconds, memory beyond the layer's, error.

    python bench/palettes.py --peers peers --shape 2048 2048

Normal weights on one thread, each side in a process of its own: fewbit; coremltools as it comes ("fast": weights
rounded to four decimals before they are clustered), and "exact". PEERS holds coremltools and deps as
``bench/quantizers.py`` says. The mean squared error is relative to the weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SIDES = ("fewbit", "fast", "exact")


def kilobytes(field: str) -> int:
    """Of this process: ``VmRSS``, what it holds, or ``VmHWM``, the most since that was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def fewbit(weight: Tensor, bits: int, rows: int) -> Callable[[], Tensor]:
    from fewbit import formats, methods

    format = formats.parse(f"palette{bits}" + (f"/rows{rows}" if rows else ""))
    return lambda: methods.rtn(weight, format).dequantize()


def coremltools(weight: Tensor, bits: int, rows: int, fast: bool) -> Callable[[], Tensor]:
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    table = {"n_bits": bits, "granularity": "per_tensor", "enable_fast_kmeans_mode": fast}
    if rows:
        table |= {"granularity": "per_grouped_channel", "group_size": rows}
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    made = PostTrainingPalettizer(model, PostTrainingPalettizerConfig.from_dict({"global_config": table}))
    return lambda: made.compress(inplace=True)[0].weight.detach()


def one(side: str, shape: tuple[int, int], bits: int, rows: int) -> None:
    """Say what ``side`` takes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    solve = fewbit(weight, bits, rows) if side == "fewbit" else coremltools(weight, bits, rows, side == "fast")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = kilobytes("VmRSS"), time.process_time()
    made = solve()
    spent, most = time.process_time() - began, (kilobytes("VmHWM") - before) * 1024 / weight.nbytes
    error = float((made - weight).square().mean() / weight.square().mean())
    rows_told = f"{rows} rows a table" if rows else "one table"
    print(f"{side:8} {bits} bits, {rows_told}: {spent:.2f} s, {most:.1f} layers, error {error:.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--shape", nargs=2, type=int, default=[2048, 2048])
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--rows", nargs="+", type=int, default=[0, 16], help="that share a table; 0: all")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--alone", action="store_true", help="in this process")
    told = parser.parse_args()
    if told.alone:
        one(told.sides[0], tuple(told.shape), told.bits[0], told.rows[0])
        return
    peers = [str(told.peers.resolve() / name) for name in ("coremltools", "deps")]
    paths = [*peers, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    for bits in told.bits:
        for rows in told.rows:
            for side in told.sides:
                row = ["--shape", *map(str, told.shape), "--bits", str(bits), "--rows", str(rows), "--sides", side]
                command = [sys.executable, __file__, "--alone", "--peers", str(told.peers), *row]
                done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    print(f"{side:8} {bits} bits: failed, {done.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
