# SPDX-License-Identifier: Apache-2.0
"""What starts when fewbit is imported, and which part may import which."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fewbit

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fewbit"
HERE = str(Path(fewbit.__file__).parents[1])
"""The folder from which this fewbit is imported: installed, or the source tree."""
NOT_IN_310 = {"tomllib", "asyncio.taskgroups", "wsgiref.types"}


def python(code: str) -> str:
    """Run ``code`` in a fresh interpreter that imports this checkout."""
    environment = os.environ | {"PYTHONPATH": HERE}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_starts_no_heavy_library() -> None:
    unwanted = ("transformers", "triton", "gguf", "tokenizers", "accelerate", "scipy", "rich", "typer", "matplotlib")
    code = f"import sys, fewbit; print([name for name in {unwanted!r} if name in sys.modules])"
    assert python(code) == "[]"


def test_import_starts_no_gpu() -> None:
    assert python("import fewbit, torch; print(torch.cuda.is_initialized())") == "False"


def test_import_leaves_the_random_state_and_the_threads() -> None:
    code = (
        "import random, numpy, torch; random.seed(1); numpy.random.seed(1); torch.manual_seed(1);"
        "torch.set_num_threads(1);"
        "before = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist());"
        "import fewbit, fewbit.cli;"
        "after = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist());"
        "print(before == after, torch.get_num_threads())"
    )
    assert python(code) == "True 1"


def test_command_line_starts_quickly() -> None:
    """`fewbit --help` must not wait for transformers or for the pipeline."""
    unwanted = ("transformers", "gguf", "scipy", "fewbit.run", "fewbit.model", "fewbit.evaluate", "rich.progress")
    code = f"import sys, fewbit.cli; print([name for name in {unwanted!r} if name in sys.modules])"
    assert python(code) == "[]"


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


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_python_310_can_read_it(path: Path) -> None:
    """Syntax and standard library of 3.10; a newer module may only be imported under a version check."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        assert not NOT_IN_310 & set(names)
    newer = {
        "typing": {"Self", "Never", "assert_never", "override", "LiteralString", "Unpack"},
        "enum": {"StrEnum"},
        "datetime": {"UTC"},
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in newer:
            assert not newer[node.module] & {alias.name for alias in node.names}
