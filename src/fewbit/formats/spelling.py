# SPDX-License-Identifier: Apache-2.0
"""Format names to formats: the only place where a spelling is taken apart. ``GRAMMAR`` says it for people."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import torch

from fewbit.core import given, observers
from fewbit.core.format import Format
from fewbit.errors import SpecError
from fewbit.formats.affine import Affine
from fewbit.formats.fixed import DEFAULT, Fixed
from fewbit.formats.grammar import unread
from fewbit.formats.minimum import Minimum
from fewbit.formats.mxfp4 import MXFP4
from fewbit.formats.nvfp4 import NVFP4
from fewbit.formats.outliers import THRESHOLD, Outliers
from fewbit.formats.palette import WIDTHS, Palette
from fewbit.formats.schemes import SCHEMES
from fewbit.formats.sign import Sign
from fewbit.formats.superblock import Superblock
from fewbit.formats.table import TABLES, Table
from fewbit.formats.ternary import Ternary
from fewbit.formats.vector import sized

LARGEST_GROUP = 8192
"""A row is padded to whole groups while it is fitted; longer groups are spelt ``channel``."""

_FLOAT = r"\d+(?:\.\d+)?(?:e[+-]?\d{1,2})?"
_GROUP = r"(?:/(?:g([1-9]\d{0,4})|(channel)))?"

_GRAMMAR: tuple[tuple[re.Pattern[str], Callable[..., Format]], ...] = (
    (
        re.compile(rf"int([1-8]){_GROUP}(?:/(sym|asym))?(?:/clip(0\.[1-9]\d?))?"),
        lambda bits, group, channel, kind, clip: Affine(
            int(bits), _block(group, channel, 128), kind != "asym", float(clip or 1)
        ),
    ),
    (
        re.compile(r"int([1-8])/tensor(?:/(sym|asym))?(?:/clip(0\.[1-9]\d?))?"),
        lambda bits, kind, clip: Affine(int(bits), 0, kind != "asym", float(clip or 1), whole=True),
    ),
    (
        re.compile(rf"int([1-8]){_GROUP}/min"),
        lambda bits, group, channel: Minimum(int(bits), _block(group, channel, 128)),
    ),
    (
        re.compile(r"int([1-8])/g([1-9]\d{0,4})x([1-9]\d{0,2})(?:/(sym|asym))?(?:/s([4-8]))?"),
        lambda bits, group, repeat, kind, scale: _superblock(int(bits), int(group), int(repeat), kind, scale),
    ),
    (
        re.compile(
            rf"int([2-8])/static(?:/(sym|asym))?(?:/({'|'.join(observers.NAMES)})({_FLOAT})?((?:/[a-z]+{_FLOAT})*))?"
        ),
        lambda bits, kind, observer, own, more: _observed(int(bits), kind == "sym", observer or DEFAULT, own, more),
    ),
    (
        re.compile(rf"int([2-8])/static/(?:(sym)/s({_FLOAT})|asym/s({_FLOAT})/z(\d{{1,3}}))"),
        lambda bits, kind, sym, asym, zero: _fixed(int(bits), kind == "sym", sym or asym, zero),
    ),
    (
        re.compile(rf"int([2-8]){_GROUP}/outliers({_FLOAT})?"),
        lambda bits, group, channel, threshold: _outliers(int(bits), _block(group, channel, 0), threshold),
    ),
    (
        re.compile(rf"({'|'.join(TABLES)}){_GROUP}(/dq)?"),
        lambda family, group, channel, coded: Table(family, _block(group, channel, 64), coded is not None),
    ),
    (re.compile(rf"sign{_GROUP}"), lambda group, channel: Sign(_block(group, channel, 128))),
    (re.compile(rf"ternary{_GROUP}"), lambda group, channel: Ternary(_block(group, channel, 128))),
    (re.compile(r"mxfp4(?:/g32)?"), MXFP4),
    (re.compile(r"nvfp4(?:/g16)?"), NVFP4),
    (
        re.compile(rf"palette({'|'.join(map(str, WIDTHS))})(?:/(row|rows[1-9]\d{{0,5}}))?(/lut8)?{_GROUP}"),
        lambda width, rows, lut8, group, channel: _palette(int(width), rows, lut8, group, channel),
    ),
    (
        re.compile(r"vector([1-9]\d?)x([1-9]\d?)(?:\+([1-9]\d?))?(?:/g([1-9]\d{0,4}))?"),
        lambda length, bits, residual, group: sized(
            int(length), int(bits), int(residual or 0), _block(group, None if group else "channel", 0)
        ),
    ),
)

EXAMPLES: tuple[str, ...] = (
    *(f"int{bits}/g128/{kind}" for bits in range(1, 9) for kind in ("sym", "asym")),
    "int4/channel/sym",
    "int8/channel/asym",
    "int8/tensor/sym",
    "int4/tensor/asym",
    "int4/g32/min",
    "int5/g32/min",
    "int4/g32x8/asym/s6",
    "int5/g32x8/asym/s6",
    "int6/g16x16/sym/s8",
    "int3/g16x16/sym/s6",
    "nf4/g64",
    "nf4/channel",
    "fp4/g64",
    "fp4bnb/g64",
    "nf4/g64/dq",
    "fp4/channel/dq",
    *(f"pot{bits}/g64" for bits in range(2, 9)),
    "mxfp4",
    "nvfp4",
    "sign/g128",
    "sign/channel",
    "ternary/g128",
    "ternary/g256",
    *(f"palette{width}" for width in (1, 2, 4)),
    "palette3/rows16",
    "palette6/rows16",
    "palette4/row",
    "palette2/row/g64",
    "palette4/channel",
    "palette3/g64",
    "palette4/lut8",
    "palette4/rows16/lut8/g64",
    "palette3/row/lut8",
    "vector8x12",
    "vector4x8/g64",
    "vector6x6+5",
)
"""One spelling of every kind of format, in canonical form: what the laws are tested on."""


def parse(text: str) -> Format:
    """The format spelt ``text``, in any case.

    >>> parse("INT4/g64").name
    'int4/g64/sym'

    Raises:
        SpecError: it is no text, spells no format, or a scheme that also quantizes activations.
    """
    given.kind("a format", text, str, "its spelling, for example 'int4/g64'")
    return _parsed(text)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Format:
    spelling = text.strip().lower()
    known = SCHEMES.get(spelling.upper())
    if known is not None and known.activation is not None:
        raise SpecError(
            f"format {text!r}",
            f"this scheme also quantizes activations, to {known.activation}",
            f"its weights alone are {known.weight}; fewbit.formats.scheme({text!r}) gives both",
        )
    if known is not None:
        spelling = known.weight
    for pattern, build in _GRAMMAR:
        if match := pattern.fullmatch(spelling):
            return build(*match.groups())
    raise unread(text, lambda part: any(pattern.fullmatch(part) for pattern, _ in _GRAMMAR))


def _block(group: str | None, channel: str | None, default: int) -> int:
    """Columns of a block; 0 for a whole row."""
    block = 0 if channel else int(group or default)
    if block > LARGEST_GROUP:
        raise SpecError(
            f"group g{block}", f"groups have at most {LARGEST_GROUP} columns", "spell a whole row 'channel'"
        )
    return block


def _observed(bits: int, symmetric: bool, observer: str, own: str | None, more: str | None) -> Fixed:
    """``own``: the number behind the observer's name; ``more``: its other options, each ``/{name}{number}``."""
    known, found = observers.named(observer).options, dict[str, float]()
    if own is not None and not known:
        raise SpecError(f"{observer}{own} of int{bits}/static", f"{observer} has no options", f"{observer} alone")
    given = [(next(iter(known)), own)] if own is not None else []
    given += re.findall(rf"/([a-z]+)({_FLOAT})", more or "")
    for name, number in given:
        if name in found:
            raise SpecError(f"{name}{number} of {observer}", f"{name} was given before", "give it once")
        found[name] = int(number) if number.isdigit() and isinstance(known.get(name), int) else float(number)
    observers.named(observer).check(found)
    apart = tuple((name, found[name]) for name, default in known.items() if found.get(name, default) != default)
    return Fixed(bits, symmetric, observer, options=apart)


def _fixed(bits: int, symmetric: bool, scale: str, zero: str | None) -> Fixed:
    step = float(torch.tensor(float(scale), dtype=torch.float32))
    if not 0 < step < math.inf:
        raise SpecError(f"scale {scale} of int{bits}/static", "it is no positive float32", "for example s0.05")
    return Fixed(bits, symmetric, scale=step, zero=1 << (bits - 1) if symmetric else int(zero or 0))


def _outliers(bits: int, block: int, threshold: str | None) -> Outliers:
    least = THRESHOLD if threshold is None else float(threshold)
    if not 0 < least < math.inf:
        raise SpecError(f"outliers from {threshold} on", "the threshold is not positive", "for example outliers6")
    return Outliers(Affine(bits, block, True), least)


def _superblock(bits: int, group: int, repeat: int, kind: str | None, scale_bits: str | None) -> Superblock:
    if group * repeat > LARGEST_GROUP:
        raise SpecError(f"group g{group}x{repeat}", f"spans have at most {LARGEST_GROUP} columns", "for example g32x8")
    return Superblock(bits, group, repeat, kind != "asym", int(scale_bits or 6))


def _palette(width: int, rows: str | None, lut8: str | None, group: str | None, channel: str | None) -> Palette:
    each = 0 if rows is None else int(rows[4:] or 1)
    if lut8 and width == 8:
        raise SpecError("palette8/lut8", "its 256 entries would be all numbers of 8 bits", "int8/channel is that")
    return Palette(width, each, bool(group or channel), _block(group, channel, 0), lut8 is not None)
