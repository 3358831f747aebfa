# SPDX-License-Identifier: Apache-2.0
"""What every command that measures kernels begins with."""

from __future__ import annotations

import sys

import torch
from rich.console import Console

from fewbit import kernels
from fewbit.kernels import native


def begun(threads: int, width: int) -> Console:
    """Where to print, ``width`` characters wide where nobody watches; torch and the kernels run ``threads`` threads
    from now on, and random numbers start anew.

    Raises:
        SystemExit: 4, where there is no native module to measure; the reason is printed.
    """
    console = Console() if sys.stdout.isatty() else Console(width=width)
    if not native.available():
        console.print(f"nothing to measure: {native.why_not()}")
        raise SystemExit(4)
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    kernels.set_threads(threads)
    return console
