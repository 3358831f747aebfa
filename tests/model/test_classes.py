# SPDX-License-Identifier: Apache-2.0
"""A folder that transformers would load with weights of its own making, or fail on in its own words, is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fewbit.errors import CorruptFileError, FewbitError, InputError, UnsupportedError
from fewbit.model.classes import from_folder


def changed(folder: Path, **values: Any) -> None:
    """Write ``values`` into the configuration of ``folder``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3-moe"])
def test_a_missing_weight_is_not_drawn_at_random(tiny_family: Callable[[str], Path], family: str) -> None:
    folder = tiny_family(family)
    from_folder(folder)
    held = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(held) if re.search(r"(layers|h)\.1\..*weight$", name))
    save_file({name: held[name] for name in held if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FewbitError, match=r"(layers|h)\.1\."):
        from_folder(folder)


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ({"vocab_size": 70}, CorruptFileError, r"has \(258, 32\), the configuration says \(70, 32\)"),
        ({"rms_norm_eps": 0}, InputError, "rms_norm_eps"),
        ({"num_attention_heads": "many"}, InputError, "num_attention_heads"),
        ({"model_type": "nosuch"}, UnsupportedError, "does not know the model type 'nosuch'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, InputError, "optimum|GPTQ|gptq"),
    ],
)
def test_refusals_are_ours(
    tiny_family: Callable[[str], Path], values: dict[str, Any], kind: type[FewbitError], said: str
) -> None:
    folder = tiny_family("llama")
    changed(folder, **values)
    with pytest.raises(kind, match=said):
        from_folder(folder)
