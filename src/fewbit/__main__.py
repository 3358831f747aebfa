# SPDX-License-Identifier: Apache-2.0
"""``python -m fewbit``: the console script, of this interpreter."""

from fewbit.cli import main

if __name__ == "__main__":
    main()
