# SPDX-License-Identifier: Apache-2.0
"""Makes ``tests/oracle`` importable as ``oracle``: the tests are collected without touching ``sys.path``."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = str(Path(__file__).resolve().parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices here are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
