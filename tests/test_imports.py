# SPDX-License-Identifier: Apache-2.0
"""What starts when fewbit is imported, and which part may import which."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fewbit

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fewbit"
HERE = str(Path(fewbit.__file__).parents[1])
"""The folder from which this fewbit is imported: installed, or the source tree."""
NOT_IN_310 = {
    *(f"typing.{name}" for name in ("Self", "Never", "assert_never", "override", "LiteralString", "Unpack")),
    "enum.StrEnum",
    "datetime.UTC",
    "itertools.batched",
    "contextlib.chdir",
    "warnings.deprecated",
}


PROBE = """
import json, random, sys
import numpy, torch
random.seed(1), numpy.random.seed(1), torch.manual_seed(1), torch.set_num_threads(1)
def state():
    return [repr(random.getstate()), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
before = state()
import fewbit
found = {"fewbit": list(sys.modules), "cuda": torch.cuda.is_initialized()}
import fewbit.cli
found |= {"cli": list(sys.modules), "same": state() == before, "threads": torch.get_num_threads()}
import fewbit.commands.inspect
found |= {"inspect": list(sys.modules)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def started() -> dict[str, Any]:
    """What a fresh interpreter holds after ``import fewbit``, and then after ``import fewbit.cli`` and after
    ``import fewbit.commands.inspect``."""
    environment = os.environ | {"PYTHONPATH": HERE}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_import_starts_no_heavy_library(started: dict[str, Any]) -> None:
    unwanted = {"transformers", "triton", "gguf", "tokenizers", "accelerate", "rich", "typer", "matplotlib"}
    assert unwanted & set(started["fewbit"]) == set()


def test_import_starts_no_gpu(started: dict[str, Any]) -> None:
    assert started["cuda"] is False


def test_import_leaves_the_random_state_and_the_threads(started: dict[str, Any]) -> None:
    assert started["same"] is True
    assert started["threads"] == 1


def test_command_line_starts_quickly(started: dict[str, Any]) -> None:
    """`fewbit --help` must not wait for transformers or for the pipeline."""
    unwanted = {
        "transformers",
        "gguf",
        "fewbit.run",
        "fewbit.model",
        "fewbit.evaluation",
        "fewbit.report",
        "rich.progress",
    }
    assert unwanted & set(started["cli"]) == set()


def test_inspect_starts_quickly(started: dict[str, Any]) -> None:
    """What lies in a folder is told without the library that would run it."""
    assert {"transformers", "fewbit.run", "fewbit.model"} & set(started["inspect"]) == set()


def test_import_contracts() -> None:
    """The direction of imports, as .importlinter states it."""
    pytest.importorskip("importlinter", reason='import-linter is not installed: pip install "fewbit[dev]"')
    environment = os.environ | {"PYTHONPATH": HERE, "NO_COLOR": "1"}
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())",
    ]
    done = subprocess.run(
        [*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr


def uses_torch_nn(source: str) -> bool:
    """Whether Python source imports or names ``torch.nn``; import-linter sees only the package ``torch``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.startswith("torch.nn") for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(name.startswith("torch.nn") for name in names):
                return True
        attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if attribute and (node.value.id, node.attr) == ("torch", "nn"):
            return True
    return False


@pytest.mark.parametrize("part", ["methods", "transforms", "containers"])
def test_no_torch_nn_in(part: str) -> None:
    using = [path.name for path in (SOURCE / part).glob("*.py") if uses_torch_nn(path.read_text(encoding="utf-8"))]
    assert using == []


def test_every_spelling_of_torch_nn_is_seen() -> None:
    spellings = (
        "import torch.nn as n",
        "from torch import nn",
        "from torch.nn import Linear",
        "torch.nn.functional.pad",
    )
    assert all(uses_torch_nn(spelling) for spelling in spellings)
    assert not uses_torch_nn("import torch\nfrom torch import Tensor\ntorch.zeros(1)")


def newer_than_310(source: str) -> list[str]:
    """What Python 3.10 lacks in ``source``; imports under a version check are not looked at.

    Raises:
        SyntaxError: 3.10 cannot parse it.
    """
    tree = ast.parse(source, feature_version=(3, 10))
    plain = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    chosen = [
        f"{node.module}.{alias.name}" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return [found for found in plain + chosen if found.split(".")[0] == "tomllib" or found in NOT_IN_310]


def test_python_310_can_read_it() -> None:
    newer = {path.name: newer_than_310(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    assert {name: found for name, found in newer.items() if found} == {}


def test_newer_python_is_seen() -> None:
    assert newer_than_310("import tomllib\nfrom typing import Self, Any") == ["tomllib", "typing.Self"]
    with pytest.raises(SyntaxError):
        newer_than_310("try:\n    pass\nexcept* ValueError:\n    pass")


def test_the_package_runs_as_a_module() -> None:
    """``python -m fewbit`` is the console script, by the same name."""
    done = subprocess.run([sys.executable, "-m", "fewbit", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.lstrip().startswith("Usage: fewbit ")
