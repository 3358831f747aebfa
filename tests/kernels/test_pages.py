# SPDX-License-Identifier: Apache-2.0
"""Arrays that share large pages."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fewbit.kernels import pages


def test_arrays_begin_with_a_line_and_never_overlap() -> None:
    shapes = [(3, 5), (0, 4), (64,), (1, 1), (pages.CHUNK - 1,), (7,), (pages.CHUNK + 9,), (2, 3, 4)]
    with ThreadPoolExecutor(4) as threads:
        arrays = list(threads.map(pages.empty, shapes * 4))
    arrays += [pages.empty((5, 7), torch.float16), pages.empty((3,), torch.float32)]
    places = sorted((a.data_ptr(), a.numel() * a.element_size()) for a in arrays if a.numel())
    assert all(at % pages.LINE == 0 for at, _ in places)
    assert all(at + nbytes <= after for (at, nbytes), (after, _) in itertools.pairwise(places))
    assert [tuple(a.shape) for a in arrays[: len(shapes)]] == shapes and all(a.is_contiguous() for a in arrays)


def test_what_is_held_is_a_copy() -> None:
    values = torch.randn(17, 9)
    there = pages.held(values.T)
    assert torch.equal(there, values.T) and torch.equal(copy.deepcopy(there), values.T)
    values.zero_()
    assert there.abs().sum() > 0


def test_memory_goes_when_its_last_array_does() -> None:
    chunk = weakref.ref(pages._Chunk(pages.PAGE))
    assert chunk() is None
    first, second = pages.empty((pages.CHUNK // 2 + 1,)), pages.empty((pages.CHUNK // 2 + 1,))
    owner = weakref.ref(first.untyped_storage())
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    del first
    gc.collect()
    assert owner() is None


@pytest.mark.skipif(sys.platform == "win32", reason="it does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_memory_is_taken_takes_some() -> None:
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with pages._lock:
            taken.set()
            done.wait(0.2)  # the fork waits for this, or else the child for nobody

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    child = os.fork()
    if not child:
        threading.Timer(20, os._exit, (1,)).start()
        os._exit(0 if pages.empty((3, 5)).numel() == 15 else 2)
    holder.join()
    assert pages.empty((2,)).numel() == 2
    until = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert ended == (child, 0)
