# SPDX-License-Identifier: Apache-2.0
"""All methods in one table and one picture: what a true bit buys.

    python bench/frontier.py stories15m --text samples.txt --calibration stories.txt --json rows.json --plot all.png

Rows are those of :data:`ROWS`, measured as ``bench/accuracy.py`` measures them, on the same windows. Those that are
there already (``--json`` of an earlier call with the same arguments) are not measured again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accuracy

ROWS: dict[str, tuple[str, ...]] = {
    "int8/channel": ("rtn",),
    "W8A8": ("rtn", "smooth 0.5"),
    "W8A8_STATIC": ("rtn",),
    "int4/g64/asym": ("rtn", "clip", "gptq act-order", "awq", "autoround"),
    "int4/g64/min": ("hqq",),
    "Q4_K": ("imatrix",),
    "nf4/g64": ("rtn",),
    "nf4/g64/dq": ("clip",),
    "int3/g64/asym": ("rtn", "clip", "gptq act-order", "awq", "autoround", "gptq act-order > rounding"),
    "int3/g16x16/sym/s6": ("imatrix",),
    "palette3/row": ("rtn", "skm", "squeezellm 0.45 %"),
    "vector2x6": ("vptq",),
    "int2/g64/asym": ("rtn", "clip", "gptq act-order", "gptq act-order > scales", "gptq act-order > rounding"),
    "int2/g16x16/asym/s4": ("imatrix",),
    "vector4x8": ("vptq", "vptq > vectors"),
    "sign/g128": ("gptq", "billm"),
    "int1/channel/min": ("ptq161", "ptq161 > scales"),
    "sign/channel": ("arb", "nanoquant 1.0", "nanoquant 2.0"),
}
"""Methods by format: names of rows of ``bench/accuracy.py``."""
FAMILIES = {
    "rtn": ("#888888", "o"),
    "clip": ("#888888", "^"),
    "imatrix": ("#888888", "s"),
    "hqq": ("#888888", "v"),
    "awq": ("#3a8f4d", "o"),
    "smooth": ("#3a8f4d", "s"),
    "gptq": ("#0b62a4", "o"),
    "autoround": ("#d1622b", "o"),
    "tuned": ("#d1622b", "^"),
    "skm": ("#a03f95", "o"),
    "squeezellm": ("#a03f95", "s"),
    "vptq": ("#b58900", "o"),
    "ptq161": ("#222222", "o"),
    "billm": ("#222222", "^"),
    "arb": ("#222222", "s"),
    "nanoquant": ("#222222", "v"),
}
"""Colour and marker."""


def family(method: str) -> str:
    return "tuned" if " > " in method else method.split()[0]


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no row of as few bits beats, by rising bits."""
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["bits"], row["kl_mean"])):
        if not found or row["kl_mean"] < found[-1]["kl_mean"]:
            found.append(row)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against true bits, both logarithmic; rows of the frontier are named, of close ones the last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    frontier = best(rows)
    bits, kl = ([row[key] for row in frontier] for key in ("bits", "kl_mean"))
    axes.plot(bits, kl, color="#cccccc", lw=1, zorder=1)
    for name, (colour, marker) in FAMILIES.items():
        mine = [row for row in rows if family(row["method"]) == name]
        points = ([row[key] for row in mine] for key in ("bits", "kl_mean"))
        if mine:
            axes.scatter(*points, color=colour, marker=marker, s=34, label=name, zorder=2)
    for row, after in zip(frontier, [*frontier[1:], None], strict=True):
        if after is not None and after["bits"] < 1.06 * row["bits"]:
            continue
        text, place = f"{row['format']} {row['method']}", (row["bits"], row["kl_mean"])
        first = row is frontier[0]  # beside which there is room above
        spot, across, up = ((6, 4), "left", "bottom") if first else ((-6, -4), "right", "top")
        axes.annotate(text, place, spot, textcoords="offset points", fontsize=7, ha=across, va=up)
    axes.set(xscale="log", yscale="log", xlabel="true bits per weight", ylabel="mean KL to the float model")
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 3, 4, 6, 8]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlim(0.7, 9.5)
    axes.grid(alpha=0.2)
    axes.legend(ncols=2, fontsize=8, frameon=False)
    axes.set_title("Lower and further left is better; the line joins what nothing of as few bits beats", fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = accuracy.parser(__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.set_defaults(context=256, windows=20, samples=48, iters=50)
    parser.add_argument("--plot", type=Path, help="a PNG")
    arguments = parser.parse_args()
    kept, rows = arguments.json, []
    if kept is not None and kept.exists():
        rows = json.loads(kept.read_text())["rows"]
    arguments.json = None
    for format, names in ROWS.items():
        arguments.formats = [format]
        arguments.methods = [n for n in names if (format, n) not in {(row["format"], row["method"]) for row in rows}]
        if arguments.methods:
            rows += accuracy.run(arguments)
        if kept is not None:
            kept.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        if arguments.plot and rows:
            draw(rows, arguments.plot)
    accuracy.show(rows)


if __name__ == "__main__":
    main()
