# SPDX-License-Identifier: Apache-2.0
"""Activations between blocks, kept on disk: bounded memory, and the state from which an interrupted run continues."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewbit.containers.files import BEGUN
from fewbit.errors import InputError

FLAGS = {
    "read": os.O_RDONLY,
    "create": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "scratch": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
}


class HiddenFile:
    """Activations (batches, batch, tokens, width) of ``dtype`` in one file, read and written a batch at a time, by any
    thread.

    ``mode``: "read" what was committed; "create" under a temporary name, to which :meth:`commit` gives ``path`` once
    it is durable; "scratch" has no name from the start, so that it is gone when it is closed or the process ends.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int, int],
        mode: Literal["read", "create", "scratch"],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._stride = dtype.itemsize * shape[1] * shape[2] * shape[3]
        self._partial = path if mode == "read" else path.with_name(f".{path.name}{BEGUN}")
        try:
            self._file = os.open(self._partial, FLAGS[mode], 0o644)
            if mode == "scratch":
                os.unlink(self._partial)
        except OSError as error:
            raise InputError(f"activation file {self._partial}", f"{error.strerror}") from None

    @property
    def nbytes(self) -> int:
        """Of all batches."""
        return self.shape[0] * self._stride

    def read(self, index: int) -> Tensor:
        """Batch ``index``, (batch, tokens, width)."""
        # Aligned as torch aligns, on which products may depend in the last bit.
        batch = torch.empty(self.shape[1:], dtype=self.dtype)
        view, offset = _bytes(batch), index * self._stride
        while view:
            count = os.preadv(self._file, [view], offset)
            if not count:
                raise InputError(
                    f"activation file {self.path}",
                    "it is shorter than when it was written",
                    "remove the .partial folder",
                )
            view, offset = view[count:], offset + count
        return batch

    def write(self, index: int, hidden: Tensor) -> None:
        """Batch ``index``, in any shape, and of a dtype that the file's holds without loss."""
        if torch.promote_types(hidden.dtype, self.dtype) != self.dtype:
            raise InputError(f"writing activations of {hidden.dtype} to {self.path}", f"the file holds {self.dtype}")
        view = _bytes(hidden.detach().to("cpu", self.dtype).contiguous())
        if len(view) != self._stride:
            raise InputError(f"writing {len(view)} bytes to {self.path}", f"a batch has {self._stride}")
        offset = index * self._stride
        try:
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise InputError(
                f"writing activations to {self.path.parent}",
                f"{error.strerror}",
                f"about {2 * self.shape[0] * self._stride} bytes must be free",
            ) from None

    def commit(self) -> None:
        """Make what was written durable, give the file its name, and close it."""
        os.fsync(self._file)
        os.replace(self._partial, self.path)
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class HiddenBatches:
    """As a scratch :class:`HiddenFile`, in memory: a batch is kept as it is written where it has its memory to itself.
    Who writes it, or reads it, leaves it as it is."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = shape, dtype
        self._held: dict[int, Tensor] = {}

    def read(self, index: int) -> Tensor:
        return self._held[index]

    def write(self, index: int, hidden: Tensor) -> None:
        values = hidden.detach().to("cpu", self.dtype).reshape(self.shape[1:]).contiguous()
        alone = values.untyped_storage().nbytes() == values.nbytes
        self._held[index] = values if alone else values.clone()

    def close(self) -> None:
        self._held.clear()


class HiddenOnce:
    """What ``file`` holds, read at once and kept in memory, that of the thread which asks for it: the pools of workers
    are full of what they compute. Who reads it leaves it as it is."""

    def __init__(self, file: HiddenFile) -> None:
        self._held = [file.read(index) for index in range(file.shape[0])]
        file.close()

    def read(self, index: int) -> Tensor:
        return self._held[index]

    def close(self) -> None:
        self._held.clear()


class HiddenTensor:
    """As :class:`HiddenFile`, in memory, where there is plenty: float32 on ``device``."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self._values = torch.empty(shape, device=device)

    def read(self, index: int) -> Tensor:
        return self._values[index]

    def write(self, index: int, hidden: Tensor) -> None:
        self._values[index] = hidden.reshape(self._values.shape[1:])

    def close(self) -> None:
        self._values = torch.empty(0)

    @classmethod
    def of(cls, file: HiddenFile, device: torch.device) -> HiddenTensor:
        """All batches of ``file``."""
        held = cls(file.shape, device)
        for index in range(file.shape[0]):
            held.write(index, file.read(index))
        return held


def fits(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes may stay in the memory of a GPU: a third of what is free."""
    return device.type != "cpu" and size < torch.cuda.mem_get_info(device)[0] / 3


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
