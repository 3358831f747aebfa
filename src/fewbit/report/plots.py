# SPDX-License-Identifier: Apache-2.0
"""The plots of a report: error and bits a layer, drift over the blocks, accuracy against size, KL by percentile."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fewbit.report import numbers as N
from fewbit.report import svg
from fewbit.report.rows import Figures
from fewbit.report.svg import Scale, tag, text
from fewbit.report.table import references, short

STEPS = 9
"""Colours of a ramp, for instance ``heat0`` to ``heat8`` in the style sheet."""
_BLOCK = re.compile(r"\.(\d+)\.(.+)")

Layer = Mapping[str, Any]
Point = tuple[float, float, float, str, str]
"""(x, y, error of y, label, kind)."""


def projection(name: str) -> tuple[int | None, str]:
    """``model.layers.3.mlp.experts.7.up_proj`` -> (3, "mlp.experts.*.up_proj"); no block number -> (None, name)."""
    found = _BLOCK.search(name.removesuffix(".weight"))
    if found is None:
        return None, name
    return int(found[1]), re.sub(r"\.\d+(?=\.|$)", ".*", found[2])


def heatmap(layers: Sequence[Layer], key: str, name: str, ramp: str, log: bool) -> Markup | None:
    """Block x projection, coloured by ``key`` on a ``ramp`` of the style sheet (heat or cool).

    A cell that stands for several layers (experts) shows the largest.

    None when fewer than two layers have a block number and a value, or when a linear scale would show one colour.
    """
    cells: dict[tuple[str, int], list[Layer]] = {}
    for layer in layers:
        block, column = projection(str(layer["name"]))
        if block is not None and isinstance(layer.get(key), int | float):
            cells.setdefault((column, block), []).append(layer)
    if len(cells) < 2 or (not log and len({float(x[key]) for group in cells.values() for x in group}) == 1):
        return None
    rows = list(dict.fromkeys(column for column, _ in cells))
    blocks = sorted({block for _, block in cells})
    values = [max(float(layer[key]) for layer in group) for group in cells.values()]
    low, high = _range(values, log)
    left, top, height, width = 8 + 7 * max(len(_label(row, rows)) for row in rows), 6, 22, 960.0
    step = (width - left - 4) / len(blocks)
    parts = [text(left - 8, top + height * i + 15, _label(row, rows), "end") for i, row in enumerate(rows)]
    for (row, block), group in cells.items():
        worst = max(group, key=lambda layer: float(layer[key]))
        heat = _heat(float(worst[key]), low, high, log)
        note = f"{worst['name']}: {name.lower()} {N.significant(float(worst[key]))}, {worst.get('format', '')}"
        more = f" (largest of {len(group)})" if len(group) > 1 else ""
        x, y = left + step * blocks.index(block), top + height * rows.index(row)
        shape = {"x": x, "y": float(y), "width": max(step - 1.5, 1.0), "height": height - 1.5, "rx": 2.0}
        parts.append(tag("rect", tag("title", note + more), class_=f"{ramp}{heat}", **shape))
    every = math.ceil(len(blocks) / 32)
    bottom = top + height * len(rows)
    for i, block in enumerate(blocks):
        if i % every == 0:
            parts.append(text(left + step * (i + 0.5), bottom + 15, str(block), "middle"))
    parts.append(text(left + step * len(blocks) / 2, bottom + 36, "block", "middle", "label"))
    parts += _legend(left, bottom + 50, low, high, ramp, log)
    worst_one = max((layer for group in cells.values() for layer in group), key=lambda layer: float(layer[key]))
    description = (
        f"{len(rows)} projections by {len(blocks)} blocks, from {N.significant(low)} to {N.significant(high)}; "
        f"the largest is {worst_one['name']}."
    )
    return svg.picture(width, bottom + 84, f"{name} of every layer", description, *parts)


def _range(values: list[float], log: bool) -> tuple[float, float]:
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    return min(usable), max(usable)


def _heat(value: float, low: float, high: float, log: bool) -> int:
    if not math.isfinite(value) or high <= low:
        return STEPS - 1 if not math.isfinite(value) else STEPS // 2
    if log:
        share = math.log(max(value, low) / low) / math.log(high / low)
    else:
        share = (value - low) / (high - low)
    return min(STEPS - 1, int(share * STEPS))


def _label(row: str, rows: Sequence[str]) -> str:
    """The last part of a projection's name, or all of it where that is not enough to tell it."""
    last = row.rsplit(".", 1)[-1]
    return (last if sum(other.rsplit(".", 1)[-1] == last for other in rows) == 1 else row)[-28:]


def _legend(x: float, y: float, low: float, high: float, ramp: str, log: bool) -> list[Markup]:
    if high <= low:
        return [text(x, y + 12, f"all {N.significant(low)}")]
    box = 26.0
    parts = [
        tag("rect", class_=f"{ramp}{i}", x=x + box * i, y=float(y), width=box - 1.5, height=10.0, rx=2.0)
        for i in range(STEPS)
    ]
    middle = math.sqrt(low * high) if log else (low + high) / 2
    for share, value in ((0.0, low), (0.5, middle), (1.0, high)):
        parts.append(text(x + box * STEPS * share, y + 26, N.significant(value), "middle" if share else "start"))
    return parts


def drift(manifest: Mapping[str, Any]) -> Markup | None:
    """Relative error of the hidden state after each block: how error accumulates. None below two blocks."""
    points = [
        (int(entry["block"]), float(entry["relative_error"]))
        for entry in manifest.get("drift") or []
        if isinstance(entry.get("relative_error"), int | float) and math.isfinite(entry["relative_error"])
    ]
    if len(points) < 2:
        return None
    x = Scale(points[0][0] - 0.5, points[-1][0] + 0.5, 52, 470)
    y = Scale.of([value for _, value in points], 232, 34, zero=True)
    path = " ".join(f"{x(block):.1f},{y(value):.1f}" for block, value in points)
    area = f"{x(points[0][0]):.1f},{y.start:.1f} {path} {x(points[-1][0]):.1f},{y.start:.1f}"
    marks = [
        tag(
            "circle",
            tag("title", f"after block {block}: {N.significant(value)}"),
            cx=x(block),
            cy=y(value),
            r=3.5,
            class_="dot",
        )
        for block, value in points
    ]
    description = (
        f"From {N.significant(points[0][1])} after block {points[0][0]} to {N.significant(points[-1][1])} at the end."
    )
    return svg.picture(
        480, 278, "Drift over the blocks", description,
        svg.axes(x, y, "after block", "relative error of the hidden state"),
        tag("polygon", points=area, class_="area"), tag("polyline", points=path, class_="stroke"), *marks,
    )  # fmt: skip


def spread(layers: Sequence[Layer]) -> Markup | None:
    """Relative error of every layer, one line a projection, logarithmic: which kind suffers, and its outliers."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        value = layer.get("relative_error")
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            groups.setdefault(projection(str(layer["name"]))[1], []).append(layer)
    groups = dict(sorted(groups.items(), key=lambda item: -_median(item[1]))[:10])
    values = [float(layer["relative_error"]) for group in groups.values() for layer in group]
    if len(values) < 3:
        return None
    names = list(groups)
    left = 16 + 7.6 * max(len(_label(name, names)) for name in names)
    step = 190 / len(names)
    x = Scale.of(values, left, 470, log=True)
    parts = [svg.line(x(value), 30, x(value), 226, "grid") for value in x.ticks()]
    parts += [text(x(value), 244, svg.trim(value), "middle") for value in x.ticks()]
    for i, (name, group) in enumerate(groups.items()):
        at = 34 + step * (i + 0.5)
        parts.append(text(left - 8, at + 4, _label(name, names), "end"))
        for layer in group:
            tip = f"{layer['name']}: {N.significant(float(layer['relative_error']))}"
            parts.append(
                tag("circle", tag("title", tip), cx=x(float(layer["relative_error"])), cy=at, r=3.6, class_="speck")
            )
        middle = x(_median(group))
        parts.append(svg.line(middle, at - min(step, 22) / 2 + 2, middle, at + min(step, 22) / 2 - 2, "median"))
    parts.append(text((left + 470) / 2, 268, "relative error (the bar is the median)", "middle", "label"))
    listed = "; ".join(f"{name} {N.significant(_median(group))}" for name, group in groups.items())
    return svg.picture(480, 278, "Error by projection", f"Median relative error, the worst first: {listed}.", *parts)


def _median(layers: Sequence[Layer]) -> float:
    return statistics.median(float(layer["relative_error"]) for layer in layers)


def quality_against_size(evaluations: Sequence[Figures]) -> Markup | None:
    """Perplexity with its error against size on disk; the originals are in it."""
    placed = _placed(evaluations, "size_bytes", "perplexity", 1e6)
    return _scatter(placed, "Accuracy against size", "size on disk, MB", "perplexity (lower is better)", log=False)


def divergence_against_bits(evaluations: Sequence[Figures]) -> Markup | None:
    """Mean token KL, logarithmic, against true bits per weight; the originals, at zero, cannot be in it."""
    placed = _placed(evaluations, "bits_per_weight", "kl_mean")
    return _scatter(placed, "Divergence against bits", "true bits per weight", "mean token KL, nats", log=True)


def _marked(evaluations: Sequence[Figures]) -> list[tuple[Figures, str]]:
    """Originals hollow, the first result filled, others grey; drawn in this order, so that the result is on top."""
    hollow = [(figures, "reference") for figures in references(evaluations)]
    return [*hollow, *[(e, "other") for e in evaluations[1:]], *[(e, "this") for e in evaluations[:1]]]


def _placed(evaluations: Sequence[Figures], x: str, y: str, unit: float = 1.0) -> list[Point]:
    """What :func:`_scatter` draws of those that know both figures, ``x`` in ``unit``."""
    return [
        (figures[x] / unit, figures[y], figures.get(f"{y}_stderr") or 0.0, short(figures["model"]), kind)
        for figures, kind in _marked(evaluations)
        if figures.get(x) and figures.get(y)
    ]


def _scatter(points: Sequence[Point], name: str, x_title: str, y_title: str, log: bool) -> Markup | None:
    """Of ``points``; None below two. Ranges that span much become logarithmic."""
    if len(points) < 2:
        return None
    xs = [point[0] for point in points]
    bounds = [max(y + sign * error, y / 2) for _, y, error, _, _ in points for sign in (-1, 1)]
    x = Scale.of(xs, 52, 462, log=max(xs) > 4 * min(xs))
    y = Scale.of(bounds, 232, 34, log=log or max(bounds) > 3 * min(bounds))
    marks, whiskers = [], []
    taken = [(x(px) - 8, y(py) - 8, x(px) + 8, y(py) + 8) for px, py, *_ in points]
    for px, py, error, label, kind in points:
        tip = tag("title", f"{label}: {svg.trim(px)} {x_title}, {N.plus_minus(py, error)} {y_title}")
        whiskers.append(svg.line(x(px), y(max(py - error, py / 2)), x(px), y(py + error), f"whisker {kind}"))
        marks.append(tag("circle", tip, cx=x(px), cy=y(py), r=6.0, class_=f"point {kind}"))
        marks.append(_name(x(px), y(py), label, kind, taken))
    listed = "; ".join(f"{label} {svg.trim(px)} at {N.significant(py)}" for px, py, _, label, _ in points)
    return svg.picture(480, 278, name, f"{listed}.", svg.axes(x, y, x_title, y_title), *whiskers, *marks)


Box = tuple[float, float, float, float]


def _name(x: float, y: float, name: str, kind: str, taken: list[Box]) -> Markup:
    """A label near its point, at the first place that covers no point and no label; ``taken`` grows."""
    shown = name if len(name) <= 24 else f"{name[:23]}…"
    width = 7.0 * len(shown)
    places = [(x + 12, y + 4), (x - 12 - width, y + 4)]
    places += [(min(max(x - width / 2, 52.0), 470 - width), y + step) for step in (-13, 22, -28, 37, -43, 52)]
    for left, base in places:
        box = (left, base - 11, left + width, base + 3)
        inside = box[0] >= 50 and box[2] <= 478 and box[1] >= 22 and box[3] <= 232
        if inside and not any(_overlap(box, other) for other in taken):
            break
    else:
        left, base = places[0]
    taken.append((left, base - 11, left + width, base + 3))
    return text(left, base, shown, class_=f"name {kind}")


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def divergence_curve(evaluation: Figures) -> Markup | None:
    """Token KL by percentile, logarithmic: is the harm everywhere, or in a few tokens?"""
    found = [(float(q), value) for q, value in (evaluation.get("kl_quantiles") or {}).items() if value]
    if len(found) < 3:
        return None
    names = {0.5: "50 %", 0.9: "90 %", 0.99: "99 %", 0.999: "99.9 %", 1.0: "worst"}
    y = Scale.of([value for _, value in found], 230, 44, log=True)
    step = 410 / len(found)
    parts = [svg.line(52, y(value), 462, y(value), "grid") for value in y.ticks()]
    parts += [text(44, y(value) + 4, svg.trim(value), "end") for value in y.ticks()]
    for i, (share, value) in enumerate(found):
        at = 52 + step * (i + 0.5)
        parts.append(tag("rect", x=at - 22, y=y(value), width=44.0, height=y.start - y(value), rx=3.0, class_="bar"))
        parts.append(text(at, y(value) - 7, N.significant(value), "middle", "value"))
        parts.append(text(at, 249, names.get(share, str(share)), "middle"))
    parts.append(text(44, 20, "token KL, nats", "start", "label"))
    parts.append(text(257, 270, "of the tokens are below", "middle", "label"))
    listed = ", ".join(f"{names.get(share, share)} {N.significant(value)}" for share, value in found)
    return svg.picture(480, 278, "Token KL by percentile", f"{listed}.", *parts)


def weight_bytes(manifest: Mapping[str, Any]) -> Markup | None:
    """Where the bytes of the file are: one bar, by projection, what was skipped last."""
    groups: dict[str, int] = {}
    for layer in manifest.get("layers") or []:
        groups.setdefault(label := projection(str(layer["name"]))[1], 0)
        groups[label] += int(layer.get("nbytes") or 0)
    largest = dict(sorted(groups.items(), key=lambda item: -item[1])[:8])
    rest = sum(groups.values()) - sum(largest.values())
    kept = sum(int(entry.get("nbytes") or 0) for entry in manifest.get("skipped") or [])
    shares = [
        *largest.items(),
        *([("other layers", rest)] if rest else []),
        *([("kept in float", kept)] if kept else []),
    ]
    total = sum(value for _, value in shares)
    if not total:
        return None
    parts, x = [], 0.0
    for i, (label, value) in enumerate(shares):
        width = 960 * value / total
        colour = "kept" if label == "kept in float" else f"part{i % 9}"
        tip = f"{label}: {N.size(value)}, {N.percent(value / total)}"
        parts.append(
            tag("rect", tag("title", tip), x=x, y=0.0, width=max(width - 1.5, 0.5), height=34.0, class_=colour)
        )
        row, column = divmod(i, 3)
        parts.append(tag("rect", x=column * 320.0, y=50.0 + 22 * row, width=11.0, height=11.0, rx=2.0, class_=colour))
        parts.append(
            text(column * 320 + 18, 60 + 22 * row, f"{label[-26:]}  {N.size(value)}, {N.percent(value / total, 0)}")
        )
        x += width
    height = 50 + 22 * math.ceil(len(shares) / 3)
    listed = "; ".join(f"{label} {N.percent(value / total)}" for label, value in shares)
    return svg.picture(960, height, "Where the bytes are", f"{N.size(total)}: {listed}.", *parts)
