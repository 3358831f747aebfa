# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests iterate over."""

from __future__ import annotations

import torch
from raw_format import Raw

from fewbit import formats, kernels, layouts
from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.layout import Layout
from fewbit.core.qtensor import QTensor
from fewbit.formats.palette import WIDTHS, Palette
from fewbit.formats.vector import LENGTHS, Vector
from fewbit.kernels.row16 import chunk
from fewbit.kernels.table import LOOKED_UP, PRODUCTS

SIZES = (1, 7, 31, 33, 97)
BATCHES = (1, 3, 4, 5, 8, 33, 65)
HERE = [row for row in kernels.KERNELS if row.isa in kernels.native.isas() or row.isa is None]
ROWS = [row.name for row in HERE if row.family != "xnor"]
"""Kernels that this machine can be forced to, of any codes."""
FAMILIES = {
    family: [name for name in ROWS if name.startswith(family)]
    for family in (name.rpartition("_")[0] or name for name in ROWS)
}
"""They by what they compute on any instruction set: a matrix and its product in float64 serve all rows of a family."""
XNOR_ROWS = [row.name for row in HERE if row.family == "xnor"]
"""Those that take signs alone."""
INTEGERS = ("int8",)
"""How the names of rows begin that round activations to int8."""
FLOAT_ROWS = [name for name in ROWS if not name.startswith(INTEGERS)]
"""Those that leave activations alone."""


def activation(kernel: str, block: str = "channel") -> Format | None:
    """What the inputs of ``kernel`` are rounded to: int8 with ``block`` for a kernel of integers, signs for one of
    signs, else None."""
    if kernel.startswith("xnor"):
        return formats.parse("sign/channel")
    block = "channel" if "row_lut" in kernel else block  # one scale a token
    return formats.parse(f"int8/{block}/sym") if kernel.startswith(INTEGERS) else None


def raw_matrix(
    kernel: str, bits: int, block: int, shape: tuple[int, int], generator: torch.Generator, scale: float | None = None
) -> QTensor:
    """Random codes of the family that ``kernel`` runs, of one bit where it runs no others; scale and offset random, or
    all ``scale`` and no offset."""
    if kernel.startswith("xnor"):
        return signs(shape, generator)
    if "row_lut" in kernel:
        # one scale a row where chunks are longer
        block = 0 if kernel.startswith("int8") or bits not in WIDTHS or block % chunk(bits) else block
        return row_tables(Palette(bits, bits % 3 + 1, True, block), shape, generator, scale)
    if kernel.startswith("int8_vector"):
        residual = int(torch.randint(4, 9, (), generator=generator)) if bits % 2 else 0
        return vectors(
            Vector(LENGTHS[bits % 6], (4, 12, 5, 9, 6, 7, 10, 8)[bits % 8], residual, block), shape, generator, scale
        )
    if kernel.startswith("vector"):
        residual = int(torch.randint(4, 10, (), generator=generator)) if bits % 2 else 0
        return vectors(Vector(LENGTHS[bits % 6], bits + 4, residual, block), shape, generator, scale)
    levels = torch.randn(2**bits, generator=generator).tolist() if "lut_" in kernel else []
    format = Raw(bits, block, tuple(levels))
    blocks = (shape[0], -(-shape[1] // (block or shape[1])), 1)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    if scale is not None:
        return QTensor.of(format, codes, {"scale": torch.full(blocks, scale), "offset": torch.zeros(blocks)})
    # A third each: any float32, values that float16 holds, and one zero point shared by all blocks.
    kind = int(torch.randint(0, 3, (), generator=generator))
    scales = torch.randn(blocks, generator=generator)
    offsets = torch.randn(blocks, generator=generator)
    if kind == 1:
        scales, offsets = scales.half().float(), offsets.half().float()
    if kind == 2:
        offsets = -scales * 2.5
    return QTensor.of(format, codes, {"scale": scales, "offset": offsets})


def vectors(format: Vector, shape: tuple[int, int], generator: torch.Generator, scale: float | None = None) -> QTensor:
    """Random codes of random books, as large as ``scale`` where float16 holds it."""
    rows, columns = F.code_shape(format, shape)
    codes = torch.randint(0, format.levels, (rows, columns), generator=generator).to(F.code_dtype(format))
    params = {}
    for param in format.params:
        book = torch.randn(B.count(columns, format.block), *param.entry, generator=generator)
        book = (book * (1.0 if scale is None else scale)).clamp(-6e4, 6e4).half()
        params[param.name] = book[None, :, None].expand(rows, *[-1] * 4)
    return QTensor.of(format, codes, params, rows=shape[0])


def there_and_back(matrix: QTensor, layout: Layout) -> QTensor:
    """``matrix``, which is dense, in ``layout``; seen to hold the same, and to come back from the dense one."""
    packed = matrix.repack(layout)
    codes, params = packed.logical()
    assert torch.equal(codes, matrix.packed) and codes.dtype == matrix.packed.dtype
    assert all(torch.equal(params[key], value) for key, value in matrix.params.items())
    assert torch.equal(packed.repack(layouts.DENSE).repack(layout).packed, packed.packed)
    return packed


def row_tables(
    format: Palette, shape: tuple[int, int], generator: torch.Generator, scale: float | None = None
) -> QTensor:
    """Random codes of random tables of rows, with random scales or all ``scale``, where float16 holds it."""
    rows, each, blocks = shape[0], format.group_rows, B.count(shape[1], format.block)
    codes = torch.randint(0, format.levels, shape, dtype=torch.uint8, generator=generator)
    tables = torch.randn(-(-rows // each), 1, 1, format.levels, generator=generator).half()
    scales = torch.randn(rows, blocks, 1, generator=generator)
    scales = scales if scale is None else torch.full_like(scales, min(scale, 6e4))
    tables = tables.repeat_interleave(each, 0)[:rows].expand(rows, blocks, 1, format.levels)
    return QTensor.of(format, codes, {"table": tables, "scale": scales.half()})


def signs(shape: tuple[int, int], generator: torch.Generator) -> QTensor:
    """Random signs with random scales, one a row."""
    codes = torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator)
    scale = torch.rand(shape[0], 1, 1, generator=generator).half()
    return QTensor.of(formats.parse("sign/channel"), codes, {"scale": scale})


def table_error(kernel: str, bits: int) -> float:
    """Of the levels that ``kernel`` multiplies, relative to the largest: bytes hold a table and a book, integers of 16
    bits a table of more than 16 levels. Sums of a book's bytes and of their offsets, of magnitudes within twice the
    ranges of books with entries of both signs, are rounded about 2^7 times."""
    if kernel.startswith("int8_vector"):
        return 1 / 255 + 2.0**-16
    if not kernel.startswith(("int8_lut", "int8_row_lut")):
        return 0.0
    return 1 / 254 + 2.0**-17 if bits <= 4 else 2.0**-15


def product_error(kernel: str, bits: int) -> float:
    """Of a product that ``kernel`` rounds, relative to that of the largest entry and activation."""
    return 2.0 ** (-21 if bits == 1 else -22) if kernel.startswith("int24_lut") else 0.0


def refused(kernel: str, bits: int) -> str | None:
    """What the error says where tables of so many ``bits`` are too many for ``kernel``."""
    most = next((most for name, most in MOST_BITS.items() if kernel.startswith(name)), bits)
    return f"at most {most} bits" if bits > most else None


MOST_BITS = {"int8_lut": LOOKED_UP, "int24_lut": PRODUCTS}
"""Of a code that such a row looks up."""
