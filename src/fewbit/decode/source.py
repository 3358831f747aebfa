# SPDX-License-Identifier: Apache-2.0
"""Where the native runtime takes a model's arrays from: a folder's safetensors, mapped into memory. What is multiplied
as it is stored stays in the file's pages, which processes share; what a kernel wants in its own layout is repacked."""

from __future__ import annotations

import ctypes as C
import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit import formats
from fewbit.containers import terms as T
from fewbit.containers.safetensors import SafetensorsFile
from fewbit.core import rewrite as R
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor, unstack
from fewbit.decode import structs as S
from fewbit.decode.weights import Builder, dense, unpacked
from fewbit.errors import CorruptFileError, InputError
from fewbit.kernels.rewrites import lowered

RELEASED = 1 << 24
"""Bytes of matrices after whose repacking the pages that they were read from are given back."""


class Pages:
    """The memory of mapped files."""

    def __init__(self, *files: mmap.mmap) -> None:
        self.files, self._read = files, 0

    def read(self, nbytes: int) -> None:
        """So much has been read that is not needed again. The system may forget the pages: it finds them in its cache,
        or in the file, where something is needed after all."""
        self._read += nbytes
        if self._read >= RELEASED and sys.platform == "linux":
            self._read = 0
            for file in self.files:
                file.madvise(mmap.MADV_DONTNEED)


def mapped(file: SafetensorsFile) -> tuple[mmap.mmap, dict[str, Tensor]]:
    """A private mapping of a checked file, and its tensors over that: nothing is read before it is used.

    Raises:
        InputError: the file cannot be read. CorruptFileError: it has become shorter since it was checked.
    """
    try:
        with open(file.path, "rb") as stream:
            pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise InputError(f"reading {file.path}", str(error)) from error
    if any(entry.end > len(pages) for entry in file.entries.values()):
        raise CorruptFileError(f"reading {file.path}", "the file became shorter while being read")
    tensors = {}
    for name, entry in file.entries.items():
        if not entry.nbytes:
            tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
            continue
        bytes_of = torch.frombuffer(pages, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)
        if entry.begin % entry.dtype.itemsize:
            bytes_of = bytes_of.clone()  # torch wants aligned elements
        tensors[name] = bytes_of.view(entry.dtype).reshape(entry.shape)
    return pages, tensors


@dataclass
class Source:
    """A model's arrays by their names in transformers' module tree, and what keeps alive those that structs point to.

    * ``modules``: the quantized ones, as in ``quantization_config``. ``rounding``: of inputs, unless a module has its
      own. ``pages``: what the arrays lie in. ``sizes``: bytes of each matrix that has been asked for, as a product
      reads them.
    """

    tensors: Mapping[str, Tensor]
    modules: Mapping[str, Mapping[str, Any]]
    rounding: Format | None
    pages: Pages = field(default_factory=Pages)
    kept: list[Any] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    _weights: dict[str, S.Weight] = field(default_factory=dict)
    _rewrites: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether there is a matrix called ``name``."""
        return name in self.modules or f"{name}.weight" in self.tensors or name in self.tensors

    def vector(self, name: str, offset: float = 0.0) -> int:
        """The address of a vector as float32, plus ``offset``."""
        return self.keep((self.tensor(name).float() + offset).contiguous())

    def keep(self, tensor: Tensor) -> int:
        """The address of ``tensor``, which lives as long as this."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def tensor(self, name: str) -> Tensor:
        """Raises CorruptFileError: there is none of that name."""
        if name not in self.tensors:
            works = "quantize again" if self.modules else "the folder as it was published"
            raise CorruptFileError(f"tensor {name}", "the folder does not hold it", works)
        return self.tensors[name]

    def weight(self, name: str, rounded: bool = True) -> S.Weight:
        """The matrix of module ``name``, with its bias; ``rounded``: its inputs may be. Made once."""
        key = f"{name} {rounded}"
        if key not in self._weights:
            bias = self.tensor(f"{name}.bias").float().contiguous() if f"{name}.bias" in self.tensors else None
            if name in self.modules:
                made = self._quantized(name, self._activation(name) if rounded else None, bias)
            else:
                tensor = self.tensor(f"{name}.weight")
                made, self.sizes[name] = dense(tensor), tensor.nbytes
                self.kept.append(tensor)
                made.bias = None if bias is None else self.keep(bias)
            self._weights[key] = made
        return self._weights[key]

    def experts(self, name: str, count: int) -> list[S.Weight]:
        """The matrices of a fused parameter (experts, rows, columns)."""
        if name not in self.modules:
            whole = self.tensor(name)
            self.kept.append(whole)
            self.sizes[name] = whole.nbytes
            return [dense(part) for part in whole]
        stored, build = self._stored(name), Builder(name, self._activation(name))
        assert isinstance(stored, QTensor)  # what is fused is no sum
        rows = stored.shape[0] // count
        made = [build.weight(one) for one in unstack(unpacked(stored), [rows] * count)]
        self._keep(build)
        return made

    def _quantized(self, name: str, activation: Format | None, bias: Tensor | None) -> S.Weight:
        build = Builder(name, activation)
        made = build.weight(self._stored(name), bias)
        self._keep(build)
        kinds = self.modules[name].get("rewrites", ())
        if kinds:
            made.rewrite, made.rewrites = self._rewrite(name, kinds, made.columns), len(kinds)
        return made

    def _keep(self, build: Builder) -> None:
        self.kept += build.kept
        self.sizes.setdefault(build.name, build.read_bytes)  # a matrix made again is an embedding's, looked up
        self.pages.read(build.read_bytes)

    def _rewrite(self, name: str, kinds: Sequence[str], columns: int) -> Any:
        """What inputs of module ``name`` go through; the same address for modules that rewrite them alike."""
        arrays = {array: self.tensor(f"{name}.input_{array}") for array in R.storage(kinds, columns)}
        key = (*kinds, *(tensor.numpy().tobytes() for tensor in arrays.values()))
        if key not in self._rewrites:
            steps = R.restore(kinds, columns, arrays).steps
            made = (S.Rewrite * len(steps))()
            for place, (factor, block, matrix, order) in enumerate(map(lowered, steps)):
                address = None if matrix is None else self.keep(matrix)
                made[place] = S.Rewrite(self.keep(factor), block, address, order)
            self.kept.append(made)
            self._rewrites[key] = C.cast(made, C.POINTER(S.Rewrite))
        return self._rewrites[key]

    def _activation(self, name: str) -> Format | None:
        own = self.modules[name].get("activation")
        return formats.parse(own) if own else self.rounding

    def _stored(self, name: str) -> T.Weight:
        """The weight of module ``name``, its experts stacked by rows."""
        entry = self.modules[name]
        plain = T.of_entry(entry)
        if "experts" in entry:
            rows, columns = plain["shape"]
            plain = {**plain, "shape": [rows * int(entry["experts"]), columns]}
        found = {}
        for array, (dtype, size) in T.sizes(plain).items():
            found[array] = self.tensor(f"{name}.weight_{array}")
            if found[array].dtype != dtype or tuple(found[array].shape) != size:
                what = f"found {found[array].dtype} {tuple(found[array].shape)}"
                raise CorruptFileError(f"array {name}.weight_{array}: {dtype} {size}", what)
        return T.restore(plain, found)
