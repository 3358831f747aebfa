# SPDX-License-Identifier: Apache-2.0
"""Energy counters: RAPL (the processor package, Linux powercap) and NVML (an NVIDIA GPU). Read, never estimated.

RAPL counts microjoules of the whole package in ``energy_uj``, which wraps at ``max_energy_range_uj``: other processes
on the machine are in the figure. Reading it usually needs root since CVE-2020-8694.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
UNAVAILABLE = "not measurable here"


@dataclass(frozen=True)
class Meter:
    """``source`` is "RAPL", "NVML" or None; ``reason`` says why there is none. ``limits``: where it wraps, uJ."""

    source: str | None
    reason: str
    limits: Mapping[Path, int]
    handle: Any = None

    def read(self) -> dict[Path, int]:
        """Microjoules of every counter now."""
        if self.source == "NVML":
            import pynvml

            return {POWERCAP: 1000 * int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))}
        return {domain: int((domain / "energy_uj").read_text()) for domain in self.limits}

    def joules(self, before: Mapping[Path, int], after: Mapping[Path, int]) -> float:
        """Energy between two reads; a counter that wrapped once is unwrapped."""
        total = 0
        for domain, start in before.items():
            spent = after[domain] - start
            total += spent if spent >= 0 else spent + self.limits.get(domain, 0)
        return total / 1e6

    @property
    def unavailable(self) -> str:
        return f"{UNAVAILABLE}: {self.reason}"


def meter(device: str = "cpu", powercap: Path = POWERCAP) -> Meter:
    """The meter of ``device`` ("cpu" or "cuda"), possibly without a source."""
    if device == "cuda":
        return _nvml()
    if not powercap.is_dir():
        return Meter(None, f"there is no RAPL interface ({powercap} is missing)", {})
    # Subdomains (intel-rapl:0:0) are part of their package: counting them would count twice.
    domains = [path for path in sorted(powercap.glob("*-rapl:*")) if path.name.count(":") == 1]
    limits: dict[Path, int] = {}
    for domain in domains:
        try:
            int((domain / "energy_uj").read_text())
            limits[domain] = int((domain / "max_energy_range_uj").read_text())
        except PermissionError:
            return Meter(None, f"{domain / 'energy_uj'} is not readable by this user", {})
        except (OSError, ValueError) as error:
            return Meter(None, f"{domain} cannot be read ({error})", {})
    if not limits:
        return Meter(None, f"{powercap} lists no RAPL package", {})
    return Meter("RAPL", "", limits)


def _nvml() -> Meter:
    try:
        import pynvml
    except ImportError:
        return Meter(None, "NVML needs the package nvidia-ml-py (pip install nvidia-ml-py)", {})
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return Meter(None, f"NVML refused ({error})", {})
    return Meter("NVML", "", {}, handle)
