# SPDX-License-Identifier: Apache-2.0
"""Where the native runtime takes a model's arrays from: a folder's safetensors, mapped into memory. What is multiplied
as it is stored stays in the file's pages, which processes share; what a kernel wants in its own layout is repacked."""

from __future__ import annotations

import ctypes as C
import mmap
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit import formats, kernels, layouts
from fewbit.containers.safetensors import SafetensorsFile
from fewbit.core import rewrite as R
from fewbit.core.format import Format, code_shape
from fewbit.core.orders import paley
from fewbit.core.qtensor import QTensor, storage
from fewbit.decode import structs as S
from fewbit.errors import CorruptFileError, InputError, UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.kernels import native
from fewbit.kernels.prepared import NativePrepared, PreparedMatrix
from fewbit.kernels.vectors import VectorPrepared
from fewbit.layouts.dense import DENSE, load_params

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
            raise CorruptFileError(f"tensor {name}", "the folder does not hold it", "quantize again")
        return self.tensors[name]

    def weight(self, name: str, rounded: bool = True) -> S.Weight:
        """The matrix of module ``name``, with its bias; ``rounded``: its inputs may be. Made once."""
        key = f"{name} {rounded}"
        if key not in self._weights:
            if name in self.modules:
                made = self._quantized(name, rounded)
            else:
                tensor = self.tensor(f"{name}.weight")
                made, self.sizes[name] = dense(tensor), tensor.nbytes
                self.kept.append(tensor)
            if f"{name}.bias" in self.tensors:
                made.bias = self.vector(f"{name}.bias")
            self._weights[key] = made
        return self._weights[key]

    def experts(self, name: str, count: int) -> list[S.Weight]:
        """The matrices of a fused parameter (experts, rows, columns)."""
        if name not in self.modules:
            whole = self.tensor(name)
            self.kept.append(whole)
            self.sizes[name] = whole.nbytes
            return [dense(part) for part in whole]
        qtensor, activation = self._qtensor(name), self._activation(name)
        codes, params = qtensor.logical()
        rows = codes.shape[0] // count
        made = []
        for expert in range(count):
            part = slice(expert * rows, (expert + 1) * rows)
            one = QTensor.of(qtensor.format, codes[part], {key: value[part] for key, value in params.items()})
            made.append(self._ready(name, one, activation))
        return made

    def _quantized(self, name: str, rounded: bool) -> S.Weight:
        made = self._ready(name, self._qtensor(name), self._activation(name) if rounded else None)
        kinds = self.modules[name].get("rewrites", ())
        if kinds:
            made.rewrite, made.rewrites = self._rewrite(name, kinds, made.columns), len(kinds)
        return made

    def _rewrite(self, name: str, kinds: Sequence[str], columns: int) -> Any:
        """What inputs of module ``name`` go through; the same address for modules that rewrite them alike."""
        arrays = {array: self.tensor(f"{name}.input_{array}") for array in R.storage(kinds, columns)}
        key = (*kinds, *(tensor.numpy().tobytes() for tensor in arrays.values()))
        if key not in self._rewrites:
            steps = R.restore(kinds, columns, arrays).steps
            made = (S.Rewrite * len(steps))()
            for place, step in enumerate(steps):
                if isinstance(step, R.Scale):
                    made[place] = S.Rewrite(self.keep(step.scale.float()), 1, None, 1)
                    continue
                matrix = self.keep(paley(step.order).float()) if step.order > 1 else None
                made[place] = S.Rewrite(self.keep(step.factors.float()), step.block, matrix, step.order)
            self.kept.append(made)
            self._rewrites[key] = C.cast(made, C.POINTER(S.Rewrite))
        return self._rewrites[key]

    def _activation(self, name: str) -> Format | None:
        own = self.modules[name].get("activation")
        return formats.parse(own) if own else self.rounding

    def _qtensor(self, name: str) -> QTensor:
        entry = self.modules[name]
        if "terms" in entry:
            raise UnsupportedError(f"the native runtime for {name}", "its weight is a sum of terms", "one matrix")
        format, layout = formats.parse(entry["format"]), layouts.named(entry["layout"])
        shape = (int(entry["shape"][0]) * int(entry.get("experts", 1)), int(entry["shape"][1]))
        arrays = {array: self.tensor(f"{name}.weight_{array}") for array in storage(format, layout, shape)}
        for array, (dtype, size) in storage(format, layout, shape).items():
            if arrays[array].dtype != dtype or tuple(arrays[array].shape) != size:
                found = f"{arrays[array].dtype} {tuple(arrays[array].shape)}"
                raise CorruptFileError(f"array {name}.weight_{array}: {dtype} {size}", f"found {found}")
        packed = arrays.pop("packed")
        if layout is DENSE and format.bits <= 8 and format.height == 1:
            return QTensor.of(format, _codes(packed, shape, format), load_params(format, shape, arrays))
        return QTensor(format, layout, shape, packed, arrays)

    def _ready(self, name: str, qtensor: QTensor, activation: Format | None) -> S.Weight:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what it warns of is refused here
            prepared = kernels.prepare(qtensor, activation=activation)
        self.kept.append(prepared)
        made, parts = tiled(name, prepared)
        self.kept.append(parts)
        self.sizes[name] = self.sizes.get(name, 0) + prepared.read_bytes
        self.pages.read(prepared.read_bytes)
        return made


def _codes(packed: Tensor, shape: tuple[int, int], format: Format) -> Tensor:
    """Codes (rows, columns / dim) of the layout ``dense``, as :func:`fewbit.layouts.dense.unpack_rows` reads them."""
    rows, columns = code_shape(format, shape)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    threads = torch.get_num_threads()
    native.core().fields_unpack(packed.data_ptr(), rows, columns, format.bits, codes.data_ptr(), threads)
    return codes


def tiled(name: str, prepared: PreparedMatrix) -> tuple[S.Weight, Any]:
    """The struct of a prepared matrix, and those of its parts; all must stay alive.

    Raises:
        UnsupportedError: no native kernel runs it.
    """
    asked = f"the native runtime for {name}"
    if isinstance(prepared, NativePrepared):
        if prepared.activation is not None and not prepared.rounds_inputs:
            found = f"no kernel multiplies {prepared.qtensor().format.name} by {prepared.activation.name}"
            raise UnsupportedError(asked, found, "leave inputs float")
        if isinstance(prepared.activation, Fixed):
            found = f"it rounds inputs by scales that it finds; these have one, {prepared.activation.name}"
            raise UnsupportedError(asked, found, "the transformers engine runs it")
        matrices = [
            S.Matrix(*(value or None if place > 7 else value for place, value in enumerate(members)))
            for _, members in prepared._matrices
        ]
        parts = (S.Matrix * len(matrices))(*matrices)
        made = S.Weight(S.TILED, prepared._isa, 0, 0, *prepared.shape, prepared._x_block, parts, len(parts))
        return made, parts
    if isinstance(prepared, VectorPrepared) and prepared.activation is None:
        vectors = S.Vectors(*(value or None if place > 6 else value for place, value in enumerate(prepared._matrix)))
        return S.Weight(S.CODEBOOK, prepared._isa, 0, 0, *prepared.shape, 0, None, 0, vectors), None
    raise UnsupportedError(asked, f"{prepared.qtensor().format.name} runs on {prepared.kernel}", "a native kernel")


def dense(tensor: Tensor) -> S.Weight:
    """The struct of a matrix (rows, columns) that is not quantized, which must stay alive.

    Raises:
        UnsupportedError: of another dtype than :data:`FLOATS`.
    """
    if tensor.dtype not in FLOATS or tensor.ndim != 2 or not tensor.is_contiguous():
        raise UnsupportedError("the native runtime", f"a matrix of {tensor.dtype} {tuple(tensor.shape)}")
    weight = S.Weight(S.DENSE, 0, native.DTYPES[tensor.dtype], 0, *tensor.shape)
    weight.dense = tensor.data_ptr()
    return weight
