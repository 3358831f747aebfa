# SPDX-License-Identifier: Apache-2.0
"""``fewbit doctor``: what this machine and this installation can do."""

from __future__ import annotations

from typing import Any

from fewbit import doctor
from fewbit.commands.console import results, table, write_json
from fewbit.report import numbers as N


def run(json_target: str | None) -> None:
    """Print what :func:`fewbit.doctor.examine` finds; with ``json_target`` write it too."""
    found = doctor.examine()
    write_json(json_target, found)
    console = results(json_target)
    for shown in tables(found):
        console.print(shown)


def tables(found: dict[str, Any]) -> list[Any]:
    """One table a question."""
    machine, native = found["machine"], found["native"]
    facts = [
        ("fewbit", found["fewbit"]),
        ("python", f"{machine['python']} on {machine['system']} {machine['architecture']}"),
        ("processor", f"{machine['processor']}, {machine['cores']} cores for this process"),
        ("memory", f"{N.size(machine['memory_bytes'])}, {N.size(machine['memory_available_bytes'])} free"),
        ("last-level cache", N.size(machine["cache_bytes"])),
        (
            "native module",
            "here" if native["available"] else f"absent: {native['why_not']}; the slow reference is used",
        ),
        (
            "instruction sets",
            f"{', '.join(native['isas']) or 'none'} used by fewbit; torch uses {machine['capability']}",
        ),
        ("GPU", ", ".join(gpu["name"] for gpu in found["gpus"]) or found["gpu_reason"]),
        ("energy counters", found["energy"]),
        ("transforms", ", ".join(found["transforms"])),
        ("transforms of the model", ", ".join(found["model_transforms"])),
        ("methods", ", ".join(found["methods"])),
        ("tunings of blocks", ", ".join(found["tunings"])),
        ("tunings of the model", ", ".join(found["model_tunings"])),
        ("layouts", ", ".join(found["layouts"])),
    ]
    return [
        table(("what", "found"), facts),
        table(("package", "version"), found["versions"].items(), "Versions"),
        table(
            ("example format", "kernel here", "instruction set"),
            [(row["format"], row["kernel"], row["isa"]) for row in found["kernels"]],
            "Kernels (a 4096 x 4096 linear layer)",
        ),
        table(
            ("extra", "serves", "state"),
            [(row["extra"], row["serves"], "here" if row["present"] else row["install"]) for row in found["extras"]],
            "Extras",
        ),
        table(
            ("target", "state", "read by"),
            [(row["target"], row["state"], row["read_by"]) for row in found["exports"]],
            "Export targets",
        ),
    ]
