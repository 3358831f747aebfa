# SPDX-License-Identifier: Apache-2.0
"""Lets the tests here import :mod:`raw_format`, which pytest's importlib mode does not do by itself."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
