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
WIDEST = 9.4
"""Bits at the right edge: torch's float layers are drawn as levels instead."""
HIGHEST = 1.25
"""Times our slowest row: the upper edge. Others above it are named in the corner."""
LINE = 0.026
"""Height of a label in panels."""


def limit(table: dict[str, Any], bits: float) -> float:
    """Microseconds that reading ``bits`` bits a weight takes at the speed of the read stream, or the multiplications
    at the int8 peak, whichever is more."""
    rows, columns = table["shape"]
    reading = bits * rows * columns / 8e3 / table["limits"]["read stream"]["gbytes_per_s"]
    peak = table["limits"].get("int8 peak")
    return max(reading, 2e-3 * table["batch"] * rows * columns / peak["gops"] if peak else 0)


def place(axes: Axes, points: list[tuple[float, float, str, str]], top: float) -> None:
    """Labels to the right of (bits, microseconds, text, colour), pushed up where they would cover one another."""
    taken: list[tuple[float, float, float]] = []
    for bits, us, text, colour in sorted(points, key=lambda point: point[1]):
        width, height = 0.062 * len(text) * WIDEST / 6.4, us
        while any(a < bits + width and bits < b and abs(height - c) < LINE * top for a, b, c in taken):
            height += LINE * top / 4
        taken.append((bits, bits + width, height))
        far = height - us > LINE * top
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.4, "alpha": 0.6} if far else None
        at = (bits + 0.1, height)
        axes.annotate(text, (bits, us), at, fontsize=6.2, color=colour, va="center", arrowprops=arrow)


def panel(axes: Axes, table: dict[str, Any], threads: int) -> None:
    rows = [row | {"us": row["seconds"] * 1e6} for row in table["rows"]]
    few = [row for row in rows if row["bits"] <= WIDEST]
    top = HIGHEST * max(row["us"] for row in few if row["engine"] == "fewbit")
    labels, above = [], []
    for engine, (colour, marker, size) in ENGINES.items():
        for integer in (True, False):
            some = [row for row in few if row["engine"] == engine and row["integer"] is integer and row["us"] <= top]
            fill, what = (colour, "int8 activations") if integer else ("none", "float activations")
            x, y = [row["bits"] for row in some], [row["us"] for row in some]
            label = f"{engine}, {what}" if some else None
            axes.scatter(
                x, y, size, marker=marker, facecolors=fill, edgecolors=colour, linewidths=1, label=label, zorder=3
            )
            labels += [(row["bits"], row["us"], row["name"], colour) for row in some]
        above += [
            f"{engine} {row['name']} {row['us']:.0f}" for row in few if row["engine"] == engine and row["us"] > top
        ]
    place(axes, labels, top)
    grid = [WIDEST * i / 200 for i in range(201)]
    axes.plot(grid, [limit(table, bits) for bits in grid], color="black", lw=1.3, label="limit: read stream, int8 peak")
    for row in rows:
        if row["bits"] > WIDEST and row["engine"] == "torch" and row["us"] <= top:
            axes.axhline(row["us"], color="#999999", lw=0.8, ls=(0, (4, 3)))
            axes.text(
                WIDEST, row["us"], f"torch {row['name']} ", fontsize=6.5, color="#555555", ha="right", va="bottom"
            )
    if above:
        note = "above, in us:\n" + "\n".join(above)
        axes.text(0.99, 0.985, note, transform=axes.transAxes, fontsize=5.8, ha="right", va="top", color="#555555")
    axes.set(xlim=(0, WIDEST), ylim=(0, top), xlabel="true bits a weight", ylabel="microseconds, median")
    axes.set_title(f"{'x'.join(map(str, table['shape']))}, batch {table['batch']}, threads {threads}", fontsize=10)
    axes.grid(color="#eeeeee", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=6.5, loc="upper left", frameon=False)


def draw(found: dict[str, Any], path: Path) -> None:
    """``found``: what the command writes as JSON.

    Raises:
        ImportError: matplotlib is not installed; ``pip install matplotlib``.
    """
    from matplotlib.figure import Figure

    tables = found["tables"]
    across = min(len(tables), 3)
    down = -(-len(tables) // across)
    figure = Figure(figsize=(6.8 * across, 6.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, table in zip(panels, tables, strict=False):
        panel(axes, table, found["about"]["threads"])
    for axes in list(panels):  # what is left of the grid
        axes.set_visible(False)
    figure.suptitle(
        f"Linear layers on {found['about']['machine']}: what lies on the black line cannot be faster", fontsize=11
    )
    figure.savefig(path, dpi=150)
