# SPDX-License-Identifier: Apache-2.0
"""Inline SVG, built from escaped pieces. Colours are classes: the page's style sheet knows the theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fewbit.report import numbers as N

TICKS = 5
"""About how many an axis has."""


def tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element; attribute names lose a trailing ``_`` and turn ``_`` into ``-``; everything else is escaped."""
    text = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(escape(name)), text, Markup("").join(children))


def _number(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: str, anchor: str = "start", class_: str = "tick") -> Markup:
    """A line of text; ``anchor``: start, middle or end."""
    return tag("text", content, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def picture(width: float, height: float, name: str, description: str, *children: str) -> Markup:
    """The ``svg`` element, with a name and a description for those who cannot see it."""
    return tag(
        "svg",
        tag("title", name),
        tag("desc", description),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{name}. {description}",
        style=f"max-width:{width:g}px",
    )


@dataclass(frozen=True)
class Scale:
    """Data ``low`` to ``high`` onto pixels ``start`` to ``end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @staticmethod
    def of(values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = False) -> Scale:
        """With a margin around ``values``; ``zero`` pins the low end to 0. Logarithmic needs positive values."""
        low, high = min(values), max(values)
        if log:
            margin = max((high / low) ** 0.08, 1.05)
            return Scale(low / margin, high * margin, start, end, True)
        span = (high - (0 if zero else low)) or abs(high) or 1
        return Scale(0 if zero else low - 0.1 * span, high + 0.1 * span, start, end)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside the range."""
        return (_log_ticks if self.log else _ticks)(self.low, self.high)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / (2 * TICKS))]
    return _ticks(low, high)


def axes(x: Scale, y: Scale, x_title: str, y_title: str) -> Markup:
    """Grid lines, tick labels and titles; y grows upwards when ``y.start > y.end``."""
    parts: list[Markup] = []
    for value in x.ticks():
        parts.append(line(x(value), y.start, x(value), y.end, "grid"))
        parts.append(text(x(value), y.start + 18, trim(value), "middle"))
    for value in y.ticks():
        parts.append(line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(text(x.start - 8, y(value) + 4, trim(value), "end"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 40, x_title, "middle", "label"))
    parts.append(text(x.start - 8, y.end - 12, y_title, "start", "label"))
    return Markup("").join(parts)


def trim(value: float) -> str:
    """A tick label without trailing zeros: 0.02, 3e-5."""
    shown, exponential, power = N.significant(value, 3).partition("e")
    shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return f"{shown}e{int(power)}" if exponential else shown
