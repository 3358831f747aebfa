# SPDX-License-Identifier: Apache-2.0
"""The page: well formed, loads nothing, lets no name inject, shows the worst first, and works in a real browser."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from fewbit.report import plots, svg
from fewbit.report.html import compare_page, page, worst_first

VOID = {"meta", "input", "br", "hr", "img", "link"}
TAGS = """html head meta title style body header div span b button h1 h2 h3 p main section i em table thead tbody tr th
td small input details summary code dl dt dd pre ul li footer script svg desc rect line text circle polygon polyline"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_spec = importlib.util.spec_from_file_location("report_samples", Path(__file__).with_name("test_report.py"))
assert _spec is not None and _spec.loader is not None
samples: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)
evaluation, manifest, HOSTILE = samples.evaluation, samples.manifest, samples.HOSTILE

PAGES: dict[str, Callable[[], str]] = {
    "one": lambda: page(manifest(), evaluation()),
    "unmeasured": lambda: page(manifest(), None),
    "original only": lambda: page(None, evaluation(name=HOSTILE)),
    "comparison": lambda: compare_page([evaluation(HOSTILE), evaluation("b", size_bytes=7e7)]),
    "broken": lambda: page(manifest(), evaluation(perplexity=None, perplexity_ratio=None, kl=9.0, kl_p999=None)),
}


class Reader(HTMLParser):
    """Collects elements and their attributes; fails on bad nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack:
            self.words.setdefault(self.stack[-1], []).append(data)


@pytest.mark.parametrize("name", PAGES)
def test_well_formed_and_loads_nothing(name: str) -> None:
    text = PAGES[name]()
    found = Reader(text)
    assert {tag for tag, _ in found.elements} <= set(TAGS.split())
    for _, attributes in found.elements:
        assert not {"src", "href", "srcset", "action", "data", "xlink:href", "background", "poster"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
    assert re.search(r"url\s*\(|@import|https?:", "".join(found.words["style"] + found.words["script"])) is None


@pytest.mark.parametrize("name", PAGES)
def test_hostile_names_are_text(name: str) -> None:
    text = PAGES[name]()
    assert [tag for tag, _ in Reader(text).elements].count("script") == 1
    assert "<script>alert" not in text and "</svg><script" not in text


def test_only_the_script_of_the_page_may_run() -> None:
    text = PAGES["one"]()
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(str(a["content"]) for _, a in Reader(text).elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def test_the_worst_layer_is_first() -> None:
    text = PAGES["one"]()
    table = text[text.index('id="layers"') :]
    errors = [float(value) for value in re.findall(r'error" data-v="([\d.e-]+)"', table)]
    assert errors == sorted(errors, reverse=True) and errors[0] == 0.3 and len(errors) == 9


def test_an_error_that_is_not_finite_is_the_worst_and_an_unknown_one_the_last() -> None:
    layers = [{"name": n, "relative_error": e} for n, e in (("a", 0.1), ("b", None), ("c", math.nan), ("d", 0.2))]
    assert [layer["name"] for layer in worst_first(layers)] == ["c", "d", "a", "b"]
    assert "data-v" in page(manifest() | {"layers": [manifest()["layers"][0] | x for x in layers]}, evaluation())


def test_everything_that_matters_is_on_the_page() -> None:
    described = manifest()
    described["layers"][0]["bits_per_weight"] = 8.25
    text = page(described, evaluation())
    for wanted in (
        "Before and after", "Accuracy against size", "Drift over the blocks", "Relative output error", "Recipe",
        "Bits per weight", "Not quantized, and why", "How it was measured", "3.0× smaller",
    ):  # fmt: skip
        assert wanted in text


@pytest.mark.parametrize("name", PAGES)
def test_pictures_have_words(name: str) -> None:
    for tag, attributes in Reader(PAGES[name]()).elements:
        if tag == "svg":
            assert attributes["role"] == "img" and len(str(attributes["aria-label"])) > 20


def test_a_large_mixture_of_experts_stays_readable() -> None:
    base = manifest()["layers"][0]
    layers = [
        base | {"name": f"model.layers.{b}.mlp.experts.{e}.up_proj", "relative_error": 0.001 * (b + e)}
        for b in range(8) for e in range(128)
    ]  # fmt: skip
    text = page(manifest() | {"layers": layers}, evaluation())
    assert "1024 quantized layers; the 400 worst are shown" in text and len(text) < 600_000
    assert "(largest of 128)" in text


def test_projection() -> None:
    assert plots.projection("model.layers.3.mlp.experts.7.up_proj.weight") == (3, "mlp.experts.*.up_proj")
    assert plots.projection("lm_head") == (None, "lm_head")


def test_tags_escape_names_and_values() -> None:
    made = svg.tag("text", "<b>", class_='"x', aria_label="<&>")
    assert str(made) == '<text class="&#34;x" aria-label="&lt;&amp;&gt;">&lt;b&gt;</text>' and isinstance(made, Markup)


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (22.1, 24.9, False), (0.003, 40, True), (5, 5, False), (7, 8, True)]
)
def test_ticks_are_inside_round_and_more_than_one(low: float, high: float, log: bool) -> None:
    scale = svg.Scale.of([low, high], 0, 100, log)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12 and all(scale.low <= tick <= scale.high for tick in ticks)
    assert all(0 <= scale(tick) <= 100 for tick in ticks)


def test_labels_of_a_scatter_do_not_overlap() -> None:
    taken: list[plots.Box] = [(95.0, 95.0, 105.0, 105.0)]
    for _ in range(4):
        plots._name(100, 100, "same place", "other", taken)
    pairs = [(a, b) for i, a in enumerate(taken) for b in taken[i + 1 :]]
    assert not any(plots._overlap(a, b) for a, b in pairs)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_real_browser_runs_the_page_offline(tmp_path: Path) -> None:
    """The script ran (headings became buttons), so the policy admits it; the hostile one did not."""
    (tmp_path / "report.html").write_text(PAGES["one"](), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    result = subprocess.run(
        [str(CHROMIUM), *flags, "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path / 'report.html'}"],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert '<button type="button">error</button>' in result.stdout
    assert "CONSOLE" not in result.stderr, "the browser complained about the page"
