# SPDX-License-Identifier: Apache-2.0
"""How formats are spelt, for people: what :mod:`fewbit.formats.spelling` reads, and what of a text it could not."""

from __future__ import annotations

import re
from collections.abc import Callable

from fewbit.core import observers
from fewbit.errors import SpecError
from fewbit.formats.palette import WIDTHS
from fewbit.formats.schemes import SCHEMES


def _spelt(observer: observers.Observer) -> str:
    """``observer`` and its options, the first one's number behind its name."""
    first, *others = (*observer.options, "")
    return observer.name + (f"[{{{first}}}]" if first else "") + "".join(f"[/{name}{{N}}]" for name in others if name)


GRAMMAR: tuple[tuple[str, str], ...] = (
    ("int{1-8}[/g{N} | /channel][/sym | /asym | /min]", "group 128 and sym unless said"),
    ("int{1-8}[/g{N} | /channel][/sym | /asym]/clip0.9", "cuts the range off there: for activations"),
    ("int{1-8}/tensor[/sym | /asym]", "one scale for the whole matrix, or for all activations of a call"),
    ("int{1-8}/g{N}x{M}[/sym | /asym][/s{4-8}]", "M blocks of N under super scales; 6-bit scales unless said"),
    (
        "nf4 | fp4 | fp4bnb | pot{2-8} [/g{N} | /channel][/dq]",
        "group 64 unless said; dq codes the scales (double quantization)",
    ),
    ("sign | ternary [/g{N} | /channel]", "group 128 unless said"),
    ("mxfp4[/g32]", "4-bit floats (E2M1) in groups of 32, the only size, under a power of two (OCP Microscaling)"),
    ("nvfp4[/g16]", "the same in groups of 16, under 8-bit float scales (E4M3) and one float32 scale a tensor"),
    (
        f"palette{{{','.join(map(str, WIDTHS))}}}[/rows{{N}} | /row][/lut8][/g{{N}} | /channel]",
        "one table a tensor unless said a group of rows or a row, of float16 unless said of int8; no scales unless "
        "said",
    ),
    (
        "vector{2,4,6,8,12,16}x{1-16}[+{1-16}][/g{N}]",
        "length x bits of an index, + bits of a residual's; one codebook a tensor unless said, else one a group of "
        "columns",
    ),
    (
        f"int{{2-8}}/static[/sym | /asym][/{' | /'.join(map(_spelt, observers.OBSERVERS))}]",
        "activations on one grid, which that observer finds: asym and mse unless said; options of observers as in "
        "percentile99.9 or mse2.4/steps50",
    ),
    ("int{2-8}/static/{sym | asym}/s{scale}[/z{zero}]", "the same, bound; a zero after asym"),
    ("int{2-8}[/g{N} | /channel]/outliers[{T}]", "activations; from T on, 6 unless said, they stay float"),
)
"""Every spelling and what it means. A scheme that leaves activations alone stands for its format."""

_KINDS = ("/static", "/outliers")


def unread(text: str, takes: Callable[[str], bool]) -> SpecError:
    """Why ``text`` is no format: which part was not understood, and how its family is spelt.

    ``takes``: whether a spelling in small letters is one.
    """
    parts = text.strip().lower().split("/")
    stem = parts[0].upper()
    if stem in SCHEMES and not takes(parts[0]):
        row = SCHEMES[stem]
        beside = f" with activations in {row.activation}" if row.activation else ""
        works = f"a scheme stands alone: {stem} is {row.weight}{beside}"
        return SpecError(f"format {text!r}", f"{'/'.join(parts[1:])!r} after {stem} was not understood", works)
    if re.match(r"[wq]\d", parts[0]):
        return SpecError(f"format {text!r}", "no such scheme", f"schemes are {', '.join(SCHEMES)}")
    read = next(("/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if takes("/".join(parts[:n]))), "")
    rest = "/".join(parts[read.count("/") + 1 :] if read else parts)
    found = f"{rest!r} after {read} was not understood" if read else f"{rest!r} was not understood"
    works = " or ".join(_family(parts)) or "for example int4/g128/asym, int3/g64, nf4/g64 or ternary/g128"
    return SpecError(f"format {text!r}", found, works)


def _family(parts: list[str]) -> list[str]:
    """Spellings that begin as the first part does, of the same kind as the others."""
    name = re.match(r"[a-z]+", parts[0])
    if name is None:
        return []
    alike = [spelling for spelling, _ in GRAMMAR if re.search(rf"\b{name[0]}(?![a-z])", spelling)]
    asked = [kind for kind in _KINDS if any(f"/{part}".startswith(kind) for part in parts)]
    return [spelling for spelling in alike if [kind for kind in _KINDS if kind in spelling] == asked]
