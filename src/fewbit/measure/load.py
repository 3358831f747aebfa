# SPDX-License-Identifier: Apache-2.0
"""Models and tokenizers by path, through transformers (imported here only when something is loaded)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewbit.containers import manifest as M
from fewbit.errors import FewbitError, InputError, UnsupportedError


def find(model: str | Path) -> Path:
    """The local folder or GGUF file of ``model``; a hub id (``owner/name``) is downloaded, the only network use.

    Raises:
        InputError: there is no such folder, and it is not a hub id.
    """
    path = Path(model)
    if path.exists():
        return path
    text = str(model)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith(".gguf"):
        raise InputError(f"model {text}", "there is no such folder or file", "give a folder, a .gguf file or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"])
        )
    except Exception as error:  # the hub client raises errors of five libraries
        raise InputError(
            f"model {text}", f"no such folder here, and the hub gave: {error}", "give a local folder"
        ) from error


def _where(path: Path) -> tuple[Path, dict[str, Any]]:
    """What ``from_pretrained`` takes for a folder or a GGUF file."""
    return (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})


def load_model(path: Path, dtype: torch.dtype) -> Any:
    """The causal language model at ``path`` in eval mode, floats in ``dtype``; a fewbit folder comes with its kernels.

    Raises:
        InputError: transformers cannot load it; its reason is in the message.
        UnsupportedError: a fewbit folder, and the plug-in that ``import fewbit`` brings is not active.
    """
    import transformers
    from transformers.quantizers import auto

    if path.is_dir() and (path / M.NAME).is_file() and "fewbit" not in auto.AUTO_QUANTIZER_MAPPING:
        raise UnsupportedError(f"load {path}", "fewbit's transformers plug-in is not active", "import fewbit first")
    folder, options = _where(path)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **options
        )
    except FewbitError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(f"load {path}", f"transformers says: {error}") from error
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside the weights, or inside the GGUF file.

    Raises:
        InputError: there is none.
    """
    import transformers

    folder, options = _where(path)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(
            f"tokenizer of {path}", f"transformers says: {error}", "copy tokenizer.json beside the weights"
        ) from error
