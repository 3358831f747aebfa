# SPDX-License-Identifier: Apache-2.0
"""The end of a run: index, config, manifest, tokenizer; verify; judge; give the folder its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fewbit
from fewbit.containers import manifest as M
from fewbit.containers.files import INDEX, digest, read_json, take_place, write_json
from fewbit.errors import QualityError
from fewbit.model.tokenizer import NUMBERED
from fewbit.recipe import FLOAT, Recipe
from fewbit.run.events import Event
from fewbit.run.state import STATE, Run
from fewbit.run.verify import verify_folder

MOST_KL = 1.0
"""Mean KL divergence (nats a token) past which a result counts as broken."""
MOST_PERPLEXITY_RATIO = 3.0


def finish(run: Run, out: Path) -> dict[str, Any]:
    """Complete ``run.folder`` and rename it to ``out``; returns the manifest.

    Raises:
        VerificationError: the folder does not read back as what was solved. Nothing is renamed.
        QualityError: the result is broken by the gate, and was not to be forced. The work is kept; ``--force`` accepts
            it.
    """
    stages, folder = run.journal.stages, run.folder
    weight_map = {name: stage["file"] for stage in stages for name in stage["tensors"]}
    total = sum(size for stage in stages for size in stage["tensors"].values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    sidecars = run.model.checkpoint.save_sidecars(folder)
    layers = [
        {key: value for key, value in record.items() if key != "seconds"}
        for stage in stages
        for record in stage["layers"]
    ]
    _config(run, folder, layers)
    manifest = _manifest(run, layers, sidecars)
    verify_folder(folder, manifest)
    _judge(manifest["check"], run.asked.force, folder, run.asked.recipe)
    write_json(folder / M.NAME, manifest)
    write_json(out.with_name(f"{out.name}.log.json"), _log(run))
    take_place(folder, out)
    shutil.rmtree(out / STATE)
    run.progress(Event("done", message=str(out)))
    return manifest


def _log(run: Run) -> dict[str, Any]:
    """Times and memory, which differ from run to run: kept out of the folder, whose bytes do not."""
    stages, kept = run.journal.stages, ("file", "seconds", "peak_rss_bytes", "order")
    return {
        "seconds": round(sum(stage["seconds"] for stage in stages), 2),
        "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in stages),
        "stages": [{key: stage[key] for key in kept if key in stage} for stage in stages],
        "layers": [
            {"name": record["name"], "seconds": record["seconds"]} for stage in stages for record in stage["layers"]
        ],
    }


def _config(run: Run, folder: Path, layers: list[dict[str, Any]]) -> None:
    """config.json with what the transformers plug-in needs to build the modules."""
    modules = {}
    for record in layers:
        described = ("terms",) if "terms" in record else ("format", "layout")
        entry = {key: record[key] for key in ("kind", *described, "shape")}
        if record["activation"] is not None:
            entry["activation"] = record["activation"]
        if record["rewrites"]:
            entry["rewrites"] = [rewrite["kind"] for rewrite in record["rewrites"]]
        if record["experts"] > 1 or record["kind"] == "experts":
            entry["experts"] = record["experts"]
        modules[record["name"]] = entry
    for site in run.model.sites:
        if site.tied_to in modules:
            modules[site.name] = {**modules[site.tied_to], "kind": site.kind, "tied_to": site.tied_to}
    config = read_json(folder / "config.json")
    if run.model.surgery is not None:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = {"quant_method": "fewbit", "version": M.VERSION, "modules": modules}
    write_json(folder / "config.json", config)


def _manifest(run: Run, layers: list[dict[str, Any]], sidecars: dict[str, str]) -> dict[str, Any]:
    stages, plan, checkpoint = run.journal.stages, run.plan, run.model.checkpoint
    skipped = [
        {
            "name": d.site.parameter,
            "reason": d.reason,
            "nbytes": d.nbytes,
            "parameters": 0 if d.site.tied_to else d.weights,
            "tied_to": d.site.tied_to,
        }
        for d in plan.decisions
        if d.rule is None
    ]
    skipped += [
        {"name": name, "reason": reason, "nbytes": size, "parameters": size // plan.kept_dtype.itemsize}
        for name, reason, size in plan.kept
    ]
    weights = sum(record["shape"][0] * record["shape"][1] * record["experts"] for record in layers)
    files = {stage["file"]: stage["sha256"] for stage in stages}
    files |= {name: digest(run.folder / name) for name in (INDEX, "config.json")}
    settings = {name: found for name, found in sidecars.items() if name not in ("config.json", *NUMBERED)}
    files |= {name: found for name, found in sidecars.items() if name in NUMBERED}
    return {
        "manifest": M.VERSION,
        "version": fewbit.__version__,
        "source": {
            "path": str(checkpoint.path.absolute()),  # a relative one would name another folder elsewhere
            "sha256": run.journal.fingerprint["weights"],
            "architecture": checkpoint.architecture,
            "bytes": checkpoint.nbytes,
        },
        "recipe": run.asked.recipe.to_dict(),
        "seed": run.asked.seed,
        "calibration": _calibration(run),
        "size_bytes": sum(stage["bytes"] for stage in stages),
        "bits_per_weight": 8 * sum(record["nbytes"] for record in layers) / weights,
        "fingerprint": run.journal.fingerprint,
        "layers": layers,
        "skipped": skipped,
        "drift": [
            {"block": stage["stage"] - 1, "relative_error": stage["drift"]} for stage in stages if "drift" in stage
        ],
        "check": stages[-1]["check"],
        **({"end": stages[-1]["end"]} if "end" in stages[-1] else {}),
        "files": files,
        "settings": settings,
    }


def _calibration(run: Run) -> dict[str, Any] | None:
    """The text that facts come from, whether of this run or of one before."""
    if run.kept is not None:
        return {**run.kept.described["calibration"], "facts": run.kept.sha256}
    data, whole = run.texts.calibration, run.texts.whole
    if data is None or whole is None:
        return None
    more = {"whole": whole.describe()} if len(whole.ids) > len(data.ids) else {}
    return {**data.describe(), **more}


def _judge(check: dict[str, Any], force: bool, folder: Path, recipe: Recipe) -> None:
    ratio = check["perplexity"] / check["reference_perplexity"]
    if force or (check["kl_mean"] <= MOST_KL and ratio <= MOST_PERPLEXITY_RATIO):
        return
    raise QualityError(
        "accepting the quantized model",
        f"on held-out text its perplexity is {check['perplexity']:.4g} against {check['reference_perplexity']:.4g} and "
        f"its KL divergence {check['kl_mean']:.3g} nats (limits: {MOST_PERPLEXITY_RATIO:g} times, {MOST_KL:g})",
        f"use more bits, smaller groups{_more(recipe)}; or --force to accept it as it is "
        f"(the work in {folder} is kept)",
    )


def _more(recipe: Recipe) -> str:
    """What ``recipe`` leaves untried, beside bits and groups."""
    ends = ("kind:embedding", "kind:head")
    inner = [rule for rule in recipe.rules if rule.format != FLOAT and rule.match not in ends]
    if not all(rule.calibrated for rule in inner):
        return ", a calibrated method"
    return "" if recipe.end or all(rule.tunings() for rule in inner) else ", a tuning such as --tune scales"


def describe(recipe: Recipe) -> str:
    """One stable line for the fingerprint."""
    return json.dumps(recipe.to_dict(), sort_keys=True)
