# SPDX-License-Identifier: Apache-2.0
"""``fewbit inspect``: what a model's files hold. Headers only; no weight is decoded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fewbit.commands.console import results, table, write_json
from fewbit.containers import files, manifest
from fewbit.containers.files import named_files
from fewbit.containers.gguf import open_gguf
from fewbit.containers.safetensors import open_safetensors
from fewbit.errors import InputError
from fewbit.measure.size import are_words
from fewbit.report import numbers as N
from fewbit.report.rows import procedure

SHOWN = 40
CALIBRATION = "facts of a calibration"


def run(path: Path, json_target: str | None) -> None:
    """Print what ``path`` holds.

    Raises:
        InputError: it is none of a model folder, a GGUF and a safetensors file. CorruptFileError: it is damaged.
    """
    found = examine(path)
    write_json(json_target, found)
    console = results(json_target)
    for shown in tables(found):
        console.print(shown)


def examine(path: Path) -> dict[str, Any]:
    """Plain data: ``kind``, ``size_bytes``, ``bits_per_weight`` (true, matrices only; None where ``quantized_by``
    packed them), ``tensors``, and for a folder of fewbit's the manifest's ``layers`` and ``skipped``, after every
    hash was checked. Of facts that were collected, ``facts.json``."""
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix == ".safetensors":
        return _summary(path, "safetensors", _safetensors(path))
    files.size_of(path)
    raise InputError(
        f"inspecting {path}", f"a {path.suffix or 'nameless'} file", "a folder, a .gguf or a .safetensors file"
    )


def _folder(path: Path) -> dict[str, Any]:
    if (path / manifest.FACTS).is_file():
        from fewbit.run.facts import KeptFacts  # as below: with transformers behind it, which takes seconds

        described = KeptFacts.read(path).described
        hashes = f"{len(described['files'])} files verified"
        return {"path": str(path), "kind": CALIBRATION, "hashes": hashes, **described}
    tensors = [tensor for shard in shards(path) for tensor in _safetensors(shard)]
    if not (path / manifest.NAME).is_file():
        found = _summary(path, "Hugging Face folder", tensors)
        if (path / "config.json").is_file():
            config = files.read_json(path / "config.json")
            found["architecture"] = ", ".join(config.get("architectures") or [])
            found["quantized_by"] = (config.get("quantization_config") or {}).get("quant_method")
        return found
    described = manifest.read(path)
    manifest.check_files(path, described)
    return {
        "path": str(path),
        "kind": "fewbit folder",
        "hashes": f"{len(described['files'])} files verified",
        "edited": manifest.edited(path, described),
        "architecture": described["source"].get("architecture", ""),
        "size_bytes": described["size_bytes"],
        "bits_per_weight": described["bits_per_weight"],
        "version": described["version"],
        "seed": described["seed"],
        "recipe": described["recipe"],
        "source": described["source"],
        "calibration": described.get("calibration"),
        "layers": described["layers"],
        "products": described.get("products", []),
        "skipped": described["skipped"],
        "tensors": tensors,
    }


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that the index names, else all.

    Raises:
        InputError: there is none, or one that the index names is missing.
    """
    found = named_files(folder)
    if not found:
        raise InputError(f"inspecting {folder}", "it holds no safetensors file", "a model folder or a .gguf file")
    return found


def _safetensors(path: Path) -> list[dict[str, Any]]:
    opened = open_safetensors(path)
    return [
        _tensor(name, tuple(entry.shape), str(entry.dtype).removeprefix("torch."), entry.nbytes, path.name)
        | ({"bits_per_weight": None} if are_words(entry.dtype, entry.shape) else {})
        for name, entry in opened.entries.items()
    ]


def _gguf(path: Path) -> dict[str, Any]:
    opened = open_gguf(path)
    tensors = [
        _tensor(name, tuple(block.shape), block.kind.name, block.nbytes, path.name)
        for name, block in opened.tensors.items()
    ]
    found = _summary(path, "GGUF", tensors)
    found["architecture"] = str(opened.metadata.get("general.architecture", ""))
    found["metadata"] = {
        key: value if len(str(value)) <= 200 else str(value)[:200] for key, value in opened.metadata.items()
    }
    return found


def _tensor(name: str, shape: tuple[int, ...], format: str, nbytes: int, file: str) -> dict[str, Any]:
    count = math.prod(shape)
    bits = 8 * nbytes / count if count else None
    return {
        "name": name,
        "shape": list(shape),
        "format": format,
        "bits_per_weight": bits,
        "nbytes": nbytes,
        "file": file,
    }


def _summary(path: Path, kind: str, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    matrices = [tensor for tensor in tensors if len(tensor["shape"]) >= 2]
    known = all(tensor["bits_per_weight"] is not None for tensor in matrices if math.prod(tensor["shape"]))
    weights = sum(math.prod(tensor["shape"]) for tensor in matrices) if known else 0
    return {
        "path": str(path),
        "kind": kind,
        "hashes": "none listed",
        "size_bytes": path.stat().st_size if path.is_file() else sum(tensor["nbytes"] for tensor in tensors),
        "bits_per_weight": 8 * sum(tensor["nbytes"] for tensor in matrices) / weights if weights else None,
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors) if known else None,
        "tensors": tensors,
    }


def tables(found: dict[str, Any]) -> Iterable[Any]:
    """A summary, the formats, then the layers of a quantized folder and what was skipped and why; of facts what and
    whose they are."""
    if found["kind"] == CALIBRATION:
        from fewbit.commands import calibrate

        lines = calibrate.rows(Path(found["path"]), found)
        yield table(("what", "found"), [("kind", CALIBRATION), *lines, ("hashes", found["hashes"])])
        return
    facts = [
        ("path", found["path"]),
        ("kind", found["kind"]),
        ("architecture", found.get("architecture") or None),
        *([("quantized by", found["quantized_by"])] if found.get("quantized_by") else []),
        ("size", N.size(found["size_bytes"])),
        ("true bits per weight", N.significant(found["bits_per_weight"], 4)),
        ("hashes", found["hashes"]),
    ]
    if found.get("edited"):
        facts.append(("changed since it was written", ", ".join(found["edited"])))
    yield table(("what", "found"), facts)
    if "layers" not in found:
        yield _by_format(found["tensors"])
        yield _listing(found["tensors"])
        return
    layers = [layer | {"bits": layer["bits_per_weight"]} for layer in found["layers"]]
    yield _by_format(layers)
    rows = [
        (
            x["name"],
            x["format"],
            x.get("activation"),
            procedure(x),
            x.get("layout"),
            x.get("kernel"),
            N.significant(x["bits"], 4),
            N.percent(x.get("relative_error"), 2),
        )
        for x in layers
    ]
    told = f"{len(rows)} quantized layers; kernels of the machine that made them"
    headers = ("layer", "format", "inputs", "method", "layout", "kernel", "bits", "error")
    shown = [i for i, header in enumerate(headers) if header != "inputs" or any(row[i] is not None for row in rows)]
    yield table([headers[i] for i in shown], [[row[i] for i in shown] for row in rows], told)
    if found["products"]:
        pairs = [(x["name"], x["left"], x["right"]) for x in found["products"]]
        yield table(("product", "left", "right"), pairs, f"{len(pairs)} products of activations in integers")
    skipped = [(x["name"], x["reason"], N.size(x["nbytes"])) for x in found["skipped"]]
    yield table(("not quantized", "reason", "size"), skipped, f"{len(skipped)} skipped")


def _by_format(tensors: list[dict[str, Any]]) -> Any:
    totals: dict[str, tuple[int, int, int]] = {}
    for tensor in tensors:
        number, weights, nbytes = totals.get(tensor["format"], (0, 0, 0))
        count = math.prod(tensor["shape"]) * tensor.get("experts", 1)
        count = 0 if tensor["bits_per_weight"] is None else count
        totals[tensor["format"]] = (number + 1, weights + count, nbytes + tensor["nbytes"])
    rows = [
        (format, number, N.size(nbytes), N.significant(8 * nbytes / weights, 4) if weights else None)
        for format, (number, weights, nbytes) in sorted(totals.items(), key=lambda item: -item[1][2])
    ]
    return table(("format", "tensors", "size", "bits"), rows)


def _listing(tensors: list[dict[str, Any]]) -> Any:
    rows = [(t["name"], " x ".join(map(str, t["shape"])), t["format"], N.size(t["nbytes"])) for t in tensors[:SHOWN]]
    rest = (
        f"the first {SHOWN} of {len(tensors)} tensors; --json lists all"
        if len(tensors) > SHOWN
        else f"{len(tensors)} tensors"
    )
    return table(("tensor", "shape", "format", "size"), rows, rest)
