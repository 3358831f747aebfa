# SPDX-License-Identifier: Apache-2.0
"""The console script, and ``python -m fewbit``."""

from __future__ import annotations

from fewbit.commands import anew


def main() -> None:
    """Do what the command line says, or what the process said that began this one."""
    said = anew.said()
    if said is None:
        from fewbit import cli

        cli.main()
    else:
        from fewbit.commands import serve

        serve.begun(**said)


if __name__ == "__main__":
    main()
