# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, file-backed pages (mapped weights) included, in bytes.

    On Linux ``VmHWM`` is read, not ``ru_maxrss``: the latter is inherited across fork and exec, so a child of a large
    process would report its parent's peak.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else 1024 * int(peak)
