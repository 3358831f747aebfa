# SPDX-License-Identifier: Apache-2.0
"""``fewbit quantize``: plan, run, verify, report."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewbit
from fewbit import methods, transforms
from fewbit.commands.console import err, results, table, write_json
from fewbit.commands.options import choice, settings
from fewbit.commands.progress import Renderer
from fewbit.containers import files, manifest
from fewbit.errors import SpecError
from fewbit.model.sites import SEEING
from fewbit.recipe import Recipe
from fewbit.report import numbers as N
from fewbit.report.rows import procedure
from fewbit.report.write import write_reports

WORST = 5


@dataclass(frozen=True)
class Request:
    """The arguments that ``quantize`` and ``plan`` share, as typed."""

    model: str
    format: str | None
    method: str
    recipe_file: Path | None
    settings: list[str] | None
    transforms: list[str] | None
    tune: list[str] | None
    calibration: str | None
    head: str
    samples: int
    context: int
    seed: int
    threads: int | None
    force: bool
    device: str = "cpu"
    facts: Path | None = None
    correct_bias: bool = False
    activation: str | None = None

    def recipe(self) -> Recipe:
        """What to do with which layer: the recipe's rules first, then --format for what they leave.

        Raises:
            SpecError: neither --format nor --recipe, or an option, a transform or a tuning that does not exist.
        """
        given = Recipe(()) if self.recipe_file is None else Recipe.read(self.recipe_file)
        rules, model, end = given.rules, given.model, given.end
        if self.format is not None:
            rest = self._simple(self.format)
            if model is not None and rest.model is not None:
                found = f"the recipe has {model.name} for the whole model"
                raise SpecError(f"--transform {rest.model.name}", found, "one of them")
            if end is not None and rest.end is not None:
                raise SpecError(f"--tune {rest.end.name}", f"the recipe ends with {end.name}", "one of them")
            rules, model, end = rules + rest.rules, model or rest.model, end or rest.end
        options_given: dict[str, Any] = {"--option": self.settings, "--transform": self.transforms, "--tune": self.tune}
        options_given["--activation"] = self.activation
        if self.format is None and (asked := next((name for name, value in options_given.items() if value), None)):
            what = {"--option": "options", "--transform": "transforms", "--tune": "tunings"}.get(asked, "activations")
            raise SpecError(f"{asked} without --format", f"a recipe names its own {what}", "write them into its rules")
        if not rules:
            works = "--format int4/g128/asym, or --recipe FILE, or both"
            raise SpecError(f"quantizing {self.model}", "neither --format nor --recipe was given", works)
        return Recipe(rules, model, end)

    def _simple(self, format: str) -> Recipe:
        """What --format and the options beside it ask for."""
        known = methods.named(self.method).options
        options = settings(self.settings or [], known, "--option", "--option desc_act=false")
        steps = (*transforms.TRANSFORMS, *transforms.MODEL_TRANSFORMS)
        tunings = (*methods.TUNINGS, *methods.MODEL_TUNINGS)
        before = [choice(text, steps, "--transform", '"smooth alpha=0.7"') for text in self.transforms or []]
        after = [choice(text, tunings, "--tune", '"scales iters=100 lr=0.01"') for text in self.tune or []]
        return Recipe.simple(format, self.method, self.head, options, before, after, self.activation)

    def planning(self) -> dict[str, Any]:
        """Keywords of :func:`fewbit.plan`."""
        return {"samples": self.samples, "context": self.context, "force": self.force}

    def running(self) -> dict[str, Any]:
        """Keywords of :func:`fewbit.quantize`."""
        data = {"calibration": self.calibration, "facts": self.facts, "seed": self.seed}
        more = {"threads": self.threads, "device": self.device, "correct_bias": self.correct_bias}
        return {**self.planning(), **data, **more}


def run(request: Request, out: Path, json_target: str | None, report: Path | None) -> None:
    """Print the plan in short, run, print the result."""
    from fewbit.commands import plan

    recipe = request.recipe()
    console = err()
    planned = fewbit.plan(request.model, recipe, **request.planning()).to_json()
    console.print(plan.summary(planned))
    with Renderer(console) as progress:
        fewbit.quantize(request.model, recipe, out=out, progress=progress, **request.running())
    described = manifest.read(out)
    written = write_reports(out, None, report)
    write_json(json_target, described)
    for shown in tables(out, described):
        results(json_target).print(shown)
    command = f"`fewbit eval {shlex.quote(str(out))}`"
    console.print(f"report: {written[-1]}; {command} measures the whole and completes it", markup=False)


def tables(out: Path, described: dict[str, Any]) -> list[Any]:
    """What came out, and the layers that suffered most."""
    log = out.with_name(f"{out.name}.log.json")
    took = files.read_json(log) if log.is_file() else {}
    check = described["check"]
    asked = f"{check['windows']} windows of {check['context']} tokens"
    before, after = N.significant(check["reference_perplexity"], 4), N.significant(check["perplexity"], 4)
    rows = [
        ("folder", str(out)),
        ("size", N.size(described["size_bytes"])),
        ("true bits per weight", f"{N.significant(described['bits_per_weight'], 4)} (scales included)"),
        (
            "layers",
            f"{len(described['layers'])} quantized, {len(described['skipped'])} kept "
            f"(see `fewbit inspect {shlex.quote(str(out))}`)",
        ),
        ("time", N.seconds(took.get("seconds"))),
        ("peak memory", N.size(took.get("peak_rss_bytes"))),
        ("perplexity", f"{after} (original {before}), a quick check on {asked}"),
        ("KL to the original", f"{N.plus_minus(check['kl_mean'], check['kl_mean_stderr'], 3)} nats a token"),
        ("same top token", N.percent(check["top1_agreement"])),
    ]
    if (model := described["recipe"].get("model")) is not None:
        rows.insert(3, ("whole model", model if isinstance(model, str) else ", ".join(map(str, model.values()))))
    if sees := [entry["nbytes"] for entry in described["skipped"] if entry["reason"].startswith(SEEING)]:
        rows.insert(4, ("kept as it was", f"vision tower and projector, {N.size(sum(sees))} ({len(sees)} tensors)"))
    if (end := described.get("end")) is not None:
        told = f"{end['name']}: {N.significant(end['before'])} -> {N.significant(end['after'])} on windows held out"
        rows.append(("learned as a whole", told))
    measured = [layer for layer in described["layers"] if layer.get("relative_error") is not None]
    measured.sort(key=lambda layer: -layer["relative_error"])
    worst = [
        (
            layer["name"],
            layer["format"],
            procedure(layer),
            N.percent(layer["relative_error"], 2),
            layer.get("note") or None,
        )
        for layer in measured[:WORST]
    ]
    return [table(("result", ""), rows), table(("worst layers", "format", "method", "error", "note"), worst)]
