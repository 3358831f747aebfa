# SPDX-License-Identifier: Apache-2.0
"""Numbers as a person reads them. None reads as a dash."""

from __future__ import annotations

import math

DASH = "–"
TIMES = "×"


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, no exponent where it can be avoided: 0.00123, 12.3, 12300."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 90.1 MB."""
    if value is None:
        return DASH
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{significant(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(value: float | None, digits: int = 1) -> str:
    """A share 0 to 1 as per cent."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def change(ratio: float, error: float | None = None) -> str:
    """A ratio as a signed change: +3.2 % ± 0.4 %; as a factor from threefold on."""
    if ratio >= 3:
        return f"{TIMES}{significant(ratio)}"
    text = f"{100 * (ratio - 1):+.1f} %"
    return text if error is None else f"{text} ± {100 * error:.1f}"


def plus_minus(value: float | None, error: float | None, digits: int = 4) -> str:
    """A value and its standard error, both to the decimals of the value."""
    if value is None or not math.isfinite(value):
        return DASH
    text = significant(value, digits)
    if error is None or not math.isfinite(error) or "e" in text:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {error:,.{decimals}f}"


def seconds(value: float | None) -> str:
    """A duration: 0.84 s, 42 s, 5 min 12 s, 2 h 03 min."""
    if value is None:
        return DASH
    if value < 60:
        return f"{significant(value, 2)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
