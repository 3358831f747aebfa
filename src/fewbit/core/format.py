# SPDX-License-Identifier: Apache-2.0
"""Format: which values exist, given which parameters.

A format is a frozen value. It never sees a model, a file, a layout or a kernel. Blocks are float32
``(rows, blocks, block)``; codes are unsigned integers of the same shape (last axis divided by ``dim``); every
parameter is ``(rows, blocks, 1)``, already in the dtype in which it is stored, so that what is decoded is exactly
what a file decodes to.

A code may stand for ``dim`` neighbours of a row (AQLM), or for ``height`` neighbours of a column (VPTQ). The second is
the first after a fold (:func:`fewbit.core.blocks.fold`): :func:`fit`, :func:`encode` and :func:`decode` below fold, and
a format sees blocks ``(ceil(rows / height), blocks, block * height)`` in which the values of a code are neighbours
either way. Rows of codes and of parameters are then ``ceil(rows / height)``; columns and blocks count as ever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.room import TOGETHER, room, times
from fewbit.errors import UnsupportedError

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Param:
    """One stored parameter array of a format.

    ``bits`` are the bits a number takes when stored; ``dtype`` is that of the array in memory. ``per`` says how
    many entries exist: one a block, one a span of ``fit_block`` columns, one for ``chunk`` blocks in the order of rows,
    one a block of columns for all rows ("columns"), one a group of ``group_rows`` rows for all columns ("rows"), or one
    for the whole tensor. ``entry``:
    the shape of an entry that is more than a number; such a parameter is ``(rows, blocks, 1, *entry)``. What all rows
    share is a view that repeats one row. ``least``: what a scale is that would be less, 0 where nothing is kept apart
    from zero.
    """

    name: str
    bits: int
    dtype: torch.dtype
    per: Literal["block", "span", "chunk", "columns", "rows", "tensor"] = "block"
    entry: tuple[int, ...] = ()
    least: float = 0.0

    @property
    def shared(self) -> bool:
        """Whether all rows have the same."""
        return self.per in ("columns", "tensor")


@dataclass(frozen=True)
class Physical:
    """What a kernel runs: ``w = scale * table[code] + offset``, with ``table[code] = code`` when there is no table.

    Shapes: ``scale`` and ``offset`` are float32 ``(rows, blocks)``; ``table`` is float32 ``(levels,)``, or ``(rows,
    levels)`` where groups of rows have their own. ``offset`` is None when it is zero everywhere.
    """

    scale: Tensor
    offset: Tensor | None
    table: Tensor | None

    @property
    def family(self) -> Literal["affine", "lut"]:
        return "affine" if self.table is None else "lut"

    def added(self, weight: Tensor, block: int, x: Tensor) -> Tensor:
        """What a kernel adds up for inputs ``x`` (tokens, columns), not negative, and ``weight`` (rows, columns):
        |scale * code| + |offset| for each weight, times x. (tokens, rows)."""
        total = times(x, torch.abs, weight)
        if self.offset is None:
            return total
        return total.addmm_(_block_sums(x, block), self.offset.abs().to(x.dtype).T, alpha=2)

    def largest(self, shape: tuple[int, int], block: int, x: Tensor) -> Tensor:
        """The largest level of each weight's table, |scale| max|table|, times inputs ``x`` (tokens, columns), not
        negative: (tokens, rows), for weights of ``shape``; 0 without tables."""
        if self.table is None:
            return x.new_zeros(len(x), shape[0])
        sizes = self.scale.abs() * self.table.abs().amax(-1, keepdim=True)
        sums = _block_sums(x, block)
        return sums @ sizes.to(x.dtype).expand(shape[0], sums.shape[1]).T


@dataclass(frozen=True)
class Vectors:
    """What a kernel of vectors runs: ``w[height r + d, column] = sum over books of book[block, index, d]``.

    ``books``: float32 (blocks, entries, height) each. The indices into them are the fields of a code, ``bits`` wide,
    lowest bits first.
    """

    books: tuple[Tensor, ...]
    bits: tuple[int, ...]

    family: Literal["vector"] = "vector"

    def added(self, weight: Tensor, block: int, x: Tensor) -> Tensor:
        """As :meth:`Physical.added`: a weight is summed before it is multiplied."""
        return x @ weight.abs().T

    def largest(self, shape: tuple[int, int], block: int, x: Tensor) -> Tensor:
        """As :meth:`Physical.largest`, of half the ranges of all books together for each book: what shares of are
        missed where every book is rounded in steps of that sum."""
        ranges = torch.stack([book.amax(1) - book.amin(1) for book in self.books]).sum(0) * len(self.books) / 2
        each = _block_sums(x, block) @ ranges.to(x.dtype)
        return each.repeat(1, -(-shape[0] // each.shape[1]))[:, : shape[0]]


def _block_sums(x: Tensor, block: int) -> Tensor:
    """Sums of the columns of each block of ``x`` (tokens, columns): (tokens, blocks)."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % block)).reshape(len(x), -1, block).sum(-1)


class Format(ABC):
    """Abstract; every concrete format is a frozen dataclass in :mod:`fewbit.formats`, and final.

    Facts (plain attributes or properties of each concrete class):

    * ``name``: the one-line spelling; ``formats.parse(f.name) == f``.
    * ``bits``: bits a code takes in a plain n-bit field. ``levels``: number of distinct codes, 2^bits unless a class
      says otherwise (3 for ternary).
    * ``block``: columns that share block parameters, 0 for a whole row. ``fit_block``: columns whose parameters must
      be fitted together (0 whole row; at least ``block``, which it is unless a class says otherwise). ``dim``: columns
      that one code stands for. ``height``: rows that it stands for.
    * ``params``: what is stored beside the codes. ``free_offset``: whether a float places the grid of a block;
      see :meth:`with_offset`.
    * ``group_rows``: rows that share an entry of those params that are one a group of rows; 1 where rows have nothing
      in common, 0 where all rows share something that is fitted to them. ``chunk``: blocks that share an entry of
      those params that are one a chunk; the last chunk of a tensor may be short.
    * ``whole``: whether all parameters are one a tensor, so that no row can be rounded without the others.
    * ``plain``: the same format with parameters of each block by itself, where this one stores those of many together:
      a search goes block by block, and :meth:`of_plain` follows it.
    * ``grid``: what decides the evenly spaced grid of a block and nothing else: its two "ends", between which the grid
      lies freely, or the larger "magnitude" of them; "" where neither is so.
    * ``even``: whether each block has a float16 scale, at least 2^-24 in magnitude, and a zero, which is ``levels / 2``
      where ``grid`` is "magnitude" and one of the codes, a byte, where it is "ends"; these, in this order, are its
      ``params``. Its values are ``scale * (code - zero)``, and :meth:`placed` puts the zero at ``-offset / scale``.
    * ``bounds``: where the largest magnitude of a block alone decides a scale of it, and values are ``scale *
      table[code]`` as :meth:`physical` gives them: float32 (levels - 1,), ascending; the code of w is the number of
      bounds that are below ``w / scale``. None elsewhere.
    * ``best_fit``: whether ``fit`` minimises the error weighted by importance itself, so that no search around it can
      help.
    """

    bits: int
    block: int
    dim: int
    height: int = 1
    free_offset: bool = False
    group_rows: int = 1
    chunk: int = 0
    whole: bool = False
    plain: Format | None = None
    grid: Literal["", "magnitude", "ends"] = ""
    even: bool = False
    bounds: Tensor | None = None
    best_fit: bool = False

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def params(self) -> tuple[Param, ...]: ...

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def fit_block(self) -> int:
        return self.block

    def bind(self, weight: Tensor) -> Format:
        """This format with its tensor-wide constants fixed from ``weight`` (rows, columns); itself when it has none."""
        return self

    @abstractmethod
    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Choose parameters for float32 ``blocks`` (rows, blocks, block).

        ``importance`` is non-negative, broadcastable to ``blocks``, and zero on padding (where ``blocks`` is zero as
        well): padding must not move a parameter. ``blocks`` holds whole spans, the last one possibly short.
        """

    @abstractmethod
    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        """Nearest code of every value, in :func:`code_dtype`; ``params`` broadcast against ``blocks``. Ties go to the
        even level. Where a code spans rows (``height``), those that fill it up are NaN and count nothing."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Float32 values of ``codes``; computed as ``physical`` says, in float32."""

    def nearest(self, blocks: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Codes, in any dtype, and their values: those of :meth:`encode` and :meth:`decode`, bit for bit.

        A format overrides it where it can spare the way through integers; solvers call it once a column.
        """
        codes = self.encode(blocks, params)
        return codes, self.decode(codes, params)

    def working(self, params: Params) -> Params:
        """``params`` as :meth:`nearest` computes with them, for many calls with the same ones."""
        return params

    def with_offset(self, params: Params, offset: Tensor) -> dict[str, Tensor]:
        """``params`` moved: the offset of :meth:`physical` as near to ``offset`` (rows, blocks, 1) as can be stored.

        Scales stay what they are as long as codes come back from the values (law 1).

        Raises:
            UnsupportedError: ``free_offset`` is false.
        """
        raise UnsupportedError(
            f"a grid of {self.name} moved", "its blocks have no float offset", "int4/g64/min has one"
        )

    def placed(self, scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
        """Parameters as near as can be stored to the grids ``scale * code + offset``, (rows, blocks, 1) each, of whole
        spans.

        Where ``grid`` is "magnitude" the middle of the grid is zero, whatever ``offset`` says, and scales may be
        negative: of an even number of levels around zero, that puts the one to spare on the other side.

        Raises:
            UnsupportedError: ``grid`` is "".
        """
        raise UnsupportedError(f"an even grid in {self.name}", "its levels are no such grid", "int4/g64/asym has one")

    def even_grids(self, params: Params) -> tuple[Tensor, Tensor]:
        """Scale and zero, float32 (rows, blocks, 1), where the format is ``even``.

        Raises:
            UnsupportedError: it is not.
        """
        raise UnsupportedError(f"an even grid in {self.name}", "its levels are no such grid", "int4/g64/asym has one")

    def of_even_grids(self, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """The parameters whose :meth:`even_grids` these are, float32 (rows, blocks, 1).

        Raises:
            UnsupportedError: the format is not ``even``.
        """
        raise UnsupportedError(f"an even grid in {self.name}", "its levels are no such grid", "int4/g64/asym has one")

    def of_plain(self, params: Params) -> dict[str, Tensor]:
        """Parameters as near as can be stored to those of :attr:`plain`, (rows, blocks, 1), of a whole tensor.

        Raises:
            UnsupportedError: ``plain`` is None.
        """
        raise UnsupportedError(f"{self.name} from parameters of each block", "it has these itself")

    def vectors_of(self, length: int, bits: int, residual: int = 0) -> Format:
        """Such a format of vectors of ``length`` weights, by indices of ``bits`` into one book for all columns, and of
        ``residual`` bits into a residual one; 0 for none.

        Raises:
            SpecError: there are no such vectors.
            UnsupportedError: the codes of this format are no vectors down a column.
        """
        raise UnsupportedError(
            f"vectors of {length} beside {self.name}", "its codes are no vectors", "vector4x8 is some"
        )

    @abstractmethod
    def physical(self, params: Params) -> Physical | Vectors:
        """The lossless lowering to a kernel family, from ``params`` of shape (rows, blocks, 1)."""


def code_dtype(format: Format) -> torch.dtype:
    """What codes are in memory: a byte each up to 8 bits, else int32 (torch can do little with uint16)."""
    return torch.uint8 if format.bits <= 8 else torch.int32


def code_shape(format: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the codes of a (rows, columns) matrix."""
    return -(-shape[0] // format.height), shape[1] // format.dim


def stackable(format: Format, rows: int) -> bool:
    """Whether matrices of ``rows`` rows, put one below the other, are one matrix in ``format``."""
    return not any(param.shared for param in format.params) and (format.group_rows < 2 or rows % format.group_rows == 0)


def params_of_rows(format: Format, params: Params, rows: Tensor) -> dict[str, Tensor]:
    """Those of the rows of codes ``rows`` (n,); what all rows share is not copied."""
    return {
        param.name: params[param.name][:1].expand(len(rows), *params[param.name].shape[1:])
        if param.shared
        else params[param.name][rows]
        for param in format.params
    }


def fit(format: Format, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Parameters for a whole ``weight`` (rows, columns); ``importance`` (columns,) or (rows, columns), default 1."""
    columns = weight.shape[1]
    mask = B.present(columns, format.block, weight.device)
    if importance is not None:
        mask = B.split(importance.float().reshape(-1, columns), format.block)
    mask = mask.expand(weight.shape[0], -1, -1) if format.height > 1 else mask
    return format.fit(B.fold(B.split(weight.float(), format.block), format.height), B.fold(mask, format.height))


def rounded(format: Format, weight: Tensor) -> Tensor:
    """The values, float32, that rounding to nearest gives a whole ``weight`` (rows, columns)."""
    format = format.bind(weight)
    params = fit(format, weight)
    return decode(format, encode(format, weight, params), params)[: weight.shape[0]]


def encode(format: Format, weight: Tensor, params: Params) -> Tensor:
    """Codes of a whole ``weight``: (rows, columns) -> (rows / height, columns / dim)."""
    whole = (0, 0, 0, -len(weight) % format.height)
    weight = torch.constant_pad_nd(weight.float(), whole, torch.nan) if any(whole) else weight.float()
    codes = format.encode(B.fold(B.split(weight, format.block), format.height), params)
    return B.join(codes, weight.shape[1] // format.dim).contiguous()


def decode(format: Format, codes: Tensor, params: Params) -> Tensor:
    """Float32 (rows, columns) from codes (rows / height, columns / dim); rows are whole codes.

    A large matrix is decoded some rows at a time: what is made on the way takes no memory of the matrix's size, several
    times over, whose pages take longer to get than values take to compute.
    """
    width = codes.shape[1] * format.dim
    step = max(1, TOGETHER // (width * format.height))
    if len(codes) <= step or codes.device.type != "cpu" or any(value.requires_grad for value in params.values()):
        return _decoded(format, codes, params)
    whole = room((len(codes) * format.height, width), torch.float32)
    for rows in torch.arange(len(codes)).split(step):
        begin, end = int(rows[0]), int(rows[-1]) + 1
        part = _decoded(format, codes[begin:end], params_of_rows(format, params, rows))
        whole[begin * format.height : end * format.height] = part
    return whole


def _decoded(format: Format, codes: Tensor, params: Params) -> Tensor:
    size = format.block // format.dim
    values = B.unfold(format.decode(B.split(codes, size), params), format.height)
    return B.join(values, codes.shape[1] * format.dim)
