# SPDX-License-Identifier: Apache-2.0
"""Makes ``tests/oracle`` importable as ``oracle``: the tests are collected without touching ``sys.path``."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).resolve().parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)
