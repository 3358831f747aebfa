# SPDX-License-Identifier: Apache-2.0
"""Activations between blocks, kept on disk: bounded memory, and the state from which an interrupted run continues."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import InputError


class HiddenFile:
    """float32 activations (batches, batch, tokens, width) in one file, read and written a batch at a time.

    Written under a temporary name; :meth:`commit` makes it durable and gives it its name.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], create: bool) -> None:
        self.path, self.shape = path, shape
        self._stride = 4 * shape[1] * shape[2] * shape[3]
        self._partial = path.with_name(f".{path.name}.tmp") if create else path
        try:
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC if create else os.O_RDONLY, 0o644)
        except OSError as error:
            raise InputError(f"activation file {self._partial}", f"{error.strerror}") from None

    def read(self, index: int) -> Tensor:
        """Batch ``index``, (batch, tokens, width)."""
        content = os.pread(self._file, self._stride, index * self._stride)
        if len(content) != self._stride:
            raise InputError(
                f"activation file {self.path}", "it is shorter than when it was written", "remove the .partial folder"
            )
        return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.float32).reshape(self.shape[1:]))

    def write(self, index: int, hidden: Tensor) -> None:
        content = memoryview(hidden.float().contiguous().numpy().tobytes())
        offset = index * self._stride
        try:
            while content:
                written = os.pwrite(self._file, content, offset)
                content, offset = content[written:], offset + written
        except OSError as error:
            raise InputError(
                f"writing activations to {self.path.parent}",
                f"{error.strerror}",
                f"about {2 * self.shape[0] * self._stride} bytes must be free",
            ) from None

    def commit(self) -> None:
        os.fsync(self._file)
        os.replace(self._partial, self.path)

    def close(self) -> None:
        os.close(self._file)
