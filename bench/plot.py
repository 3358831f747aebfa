# SPDX-License-Identifier: Apache-2.0
"""The picture of ``bench/kernels.py``: time against true bits, one panel a table, the limit of the machine below."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENGINES = {
    "fewbit": ("#0b62a4", "o", 58),
    "llama.cpp": ("#d1622b", "s", 30),
    "onnxruntime": ("#3a8f4d", "^", 38),
    "torch": ("#777777", "D", 26),
    "torchao": ("#a03f95", "v", 36),
}
"""Colour, marker and its area."""
WIDTH, HEIGHT = 480, 430
"""Of a panel's inside, in points."""
WIDEST = 10.0
"""Bits at the right edge: what is wider is drawn as a level, where it fits."""
HIGHEST = 1.12
"""Upper edge, in times of our slowest row. What lies above it is named in the corner."""
CHARACTER, LINE = 3.5, 7.4
"""Size of the labels' letters, in points."""

Box = tuple[float, float, float, float]
"""Left, low, right, high, in points."""


def apart(a: Box, b: Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def spots(width: float) -> list[tuple[float, float]]:
    """Where the left middle of a label can lie, seen from its point: beside it first, then further and further."""
    near = [(6.0, 0.0), (-6.0 - width, 0.0)]
    for away in (8.0, 13.0, 19.0, 26.0, 34.0, 43.0, 53.0):
        near += [(5.0, -away), (5.0, away), (-5.0 - width, away), (-5.0 - width, -away), (-width / 2, away)]
    return near


def label(axes: Axes, points: list[tuple[float, float, str, str]], top: float, end: float) -> None:
    """Writes the text of every (bits, microseconds, text, colour) near its point, where neither another point or text
    is nor the line from the origin to ``end`` microseconds at the right edge."""
    seen = [(bits / WIDEST * WIDTH, us / top * HEIGHT) for bits, us, *_ in points]
    line = [(x, x * end / top * HEIGHT / WIDTH) for x in range(0, WIDTH, 4)]
    taken: list[Box] = [(x - 3.5, y - 3.5, x + 3.5, y + 3.5) for x, y in seen]
    taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in line]
    for (x, y), (bits, us, text, colour) in sorted(zip(seen, points, strict=True), key=lambda each: each[0][1]):
        width = CHARACTER * len(text)
        boxes = [(x + a, y + b - LINE / 2, x + a + width, y + b + LINE / 2) for a, b in spots(width)]
        inside = [box for box in boxes if box[0] > 0 and box[2] < WIDTH and box[1] > 0]
        box = next((box for box in inside if all(apart(box, other) for other in taken)), inside[0])
        taken.append(box)
        a, b = box[0] - x, box[1] + LINE / 2 - y
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.4, "shrinkA": 0, "shrinkB": 3} if abs(b) > LINE else None
        how = {"fontsize": 6.3, "color": colour, "va": "center", "annotation_clip": False}
        axes.annotate(text, (bits, us), (a, b), textcoords="offset points", arrowprops=arrow, **how)


def reading(table: dict[str, Any]) -> float:
    """Microseconds that the read stream takes for as many bits as the right edge shows."""
    rows, columns = table["shape"]
    return float(WIDEST * rows * columns / 8e3 / table["limits"]["read stream"]["gbytes_per_s"])


def limits(axes: Axes, table: dict[str, Any], top: float) -> None:
    rows, columns = table["shape"]
    stream, peak = table["limits"]["read stream"]["gbytes_per_s"], table["limits"].get("int8 peak")
    axes.plot([0, WIDEST], [0, reading(table)], color="black", lw=1.4, label=f"read stream, {stream:.0f} GB/s")
    if peak:
        level = 2e-3 * table["batch"] * rows * columns / peak["gops"]
        text = f"int8 peak, {peak['gops']:.0f} GOPS"
        axes.axhline(level, color="black", lw=1.1, ls=(0, (1, 1.5)), label=text)
    for row in table["rows"]:
        us = row["seconds"] * 1e6
        if row["bits"] > WIDEST and us <= top:
            axes.axhline(us, color=ENGINES[row["engine"]][0], lw=0.8, ls=(0, (5, 4)), alpha=0.7)
            text = f"{row['engine']} {row['name']}"
            axes.text(WIDEST, us, text, fontsize=6.3, color=ENGINES[row["engine"]][0], ha="right", va="bottom")


def panel(axes: Axes, table: dict[str, Any], threads: int) -> None:
    rows = [row | {"us": row["seconds"] * 1e6} for row in table["rows"] if row["bits"] <= WIDEST]
    top = HIGHEST * max(row["us"] for row in rows if row["engine"] == "fewbit")
    shown = [row for row in rows if row["us"] <= top]
    for engine, (colour, marker, size) in ENGINES.items():
        for integer, fill, what in ((True, colour, "integer products"), (False, "white", "float products")):
            some = [row for row in shown if row["engine"] == engine and row["integer"] is integer]
            x, y = [row["bits"] for row in some], [row["us"] for row in some]
            how = {"facecolors": fill, "edgecolors": colour, "linewidths": 1.1, "zorder": 3}
            axes.scatter(x, y, size, marker=marker, label=f"{engine}, {what}" if some else None, **how)
    label(
        axes, [(row["bits"], row["us"], row["name"], ENGINES[row["engine"]][0]) for row in shown], top, reading(table)
    )
    limits(axes, table, top)
    above = [f"{row['engine']} {row['name']}: {row['us'] / 1e3:.1f}" for row in rows if row["us"] > top]
    if above:
        note = "above, in ms\n" + "\n".join(sorted(above))
        axes.text(1.01, 0.99, note, transform=axes.transAxes, fontsize=6.3, va="top", color="#555555")
    axes.set(xlim=(0, WIDEST), ylim=(0, top), xlabel="true bits a weight", ylabel="microseconds, median")
    axes.set_title(f"{' x '.join(map(str, table['shape']))}, batch {table['batch']}, threads {threads}", fontsize=10)
    axes.grid(color="#eeeeee", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=4, frameon=False)


def draw(found: dict[str, Any], path: Path) -> None:
    """``found``: what the command writes as JSON.

    Raises:
        ImportError: matplotlib is not installed; ``pip install matplotlib``.
    """
    from matplotlib.figure import Figure

    tables = found["tables"]
    across = min(len(tables), 3)
    down = -(-len(tables) // across)
    figure = Figure(figsize=((WIDTH + 170) / 72 * across, (HEIGHT + 110) / 72 * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, table in zip(panels, tables, strict=False):
        panel(axes, table, found["about"]["threads"])
    for axes in panels[len(tables) :]:
        axes.set_visible(False)
    figure.suptitle(f"Linear layers on {found['about']['machine']}, beside what the machine can do", fontsize=11)
    figure.savefig(path, dpi=150)
