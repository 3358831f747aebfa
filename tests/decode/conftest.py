# SPDX-License-Identifier: Apache-2.0
"""Lets the tests here import their helpers, which pytest's importlib mode does not do by itself, and keeps torch to one
thread: matrices here are so small that its threads only wait for one another."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
