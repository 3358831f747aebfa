# SPDX-License-Identifier: Apache-2.0
"""What transformers makes of a folder's tokenizer, kept beside the image for the next start.

Classes such as Qwen2Tokenizer and GemmaTokenizer build their tokenizer from parts of the folder's files. The package
tokenizers can write what they built, and :mod:`fewbit.model.tokenizer` reads that without transformers, whose import
takes seconds and several hundred MiB. It counts as long as the folder's files and both packages are as they were.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

import fewbit
from fewbit.containers import manifest
from fewbit.containers.files import read_json, write_bytes, write_json
from fewbit.decode.opened import FOLDER, state_of
from fewbit.errors import FewbitError
from fewbit.model.tokenizer import FILES, FileTokenizer, read_file

FILE, BESIDE = "tokenizer.json", "tokenizer_made_from.json"
PACKAGES = ("transformers", "tokenizers")
WATCHED = ("config.json", "additional_chat_templates")
"""What transformers chooses a class and templates by, beside a tokenizer's own files."""
TEXTS = ("a", " two  words,\tand 1234\r\n\n  more", "ÅA\u030a naïve “quoted” 語 🙂 \u200bx", "\u2581a<0x41> Ġb")
"""What both must read alike: spaces at either end and in between, digits, composed and decomposed letters, emoji."""


def open_kept(folder: Path, once: bool) -> FileTokenizer | None:
    """The tokenizer that :func:`keep` kept in ``folder``; None where there is none that counts. ``once``: as
    :func:`fewbit.model.tokenizer.open_tokenizer` has it."""
    beside = folder / FOLDER / BESIDE
    try:
        if not beside.is_file():
            return None
        told = read_json(beside)
        if told["made_from"] != _stamp(folder):
            return None
        return _read(folder, told, once)
    except (OSError, FewbitError, LookupError, TypeError):
        return None


def keep(folder: Path, tokenizer: Any) -> None:
    """Keep ``tokenizer``, which transformers made of ``folder``, if that is one of ours and another process would read
    it alike; else, and where it cannot be written, nothing happens."""
    if not (folder / manifest.NAME).is_file() or not _plain(tokenizer):
        return
    file = folder / FOLDER / FILE
    with suppress(FewbitError, OSError):
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, tokenizer.backend_tokenizer.to_str().encode())
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        told = {"named": named, "longest": tokenizer.model_max_length, "template": tokenizer.chat_template}
        if (read := _read(folder, told, once=False)) is not None and _alike(tokenizer, read):
            write_json(folder / FOLDER / BESIDE, {"made_from": _stamp(folder), **told})
        else:
            file.unlink()


def _read(folder: Path, told: dict[str, Any], once: bool) -> FileTokenizer | None:
    config = {**told["named"], "model_max_length": told["longest"]}
    found = read_file(folder / FOLDER / FILE, config, told["template"], once)
    if found is not None:
        found.special_tokens_map = told["named"]  # some name tokens for images, which their templates may use
    return found


def _stamp(folder: Path) -> dict[str, Any]:
    """What a tokenizer is made from: files of ``folder``, and the packages that read them."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {
        "version": fewbit.__version__,
        "files": {name: state_of(folder / name) for name in (*FILES, *WATCHED)},
        "kept": state_of(folder / FOLDER / FILE),
        "packages": {name: state_of(Path(str(spec and spec.origin))) for name, spec in specs.items()},
    }


def _plain(tokenizer: Any) -> bool:
    """Whether ``tokenizer`` is no more than what the package tokenizers has of it."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    own = isinstance(tokenizer, TokenizersBackend) and all(
        getattr(type(tokenizer), name) is getattr(TokenizersBackend, name) for name in ("_encode_plus", "_decode")
    )
    return own and not tokenizer.split_special_tokens and isinstance(tokenizer.chat_template, str | None)


def _alike(tokenizer: Any, other: FileTokenizer) -> bool:
    """Whether both read :data:`TEXTS`, every special token among them, and write them, alike."""
    texts = [*TEXTS, "x".join([*tokenizer.all_special_tokens, *TEXTS])]
    for text in texts:
        for special in (True, False):
            ids = [words(text, add_special_tokens=special, verbose=False)["input_ids"] for words in (tokenizer, other)]
            told = [words.decode(ids[0], special, clean_up_tokenization_spaces=False) for words in (tokenizer, other)]
            if ids[0] != ids[1] or told[0] != told[1]:
                return False
    names = ("bos_token_id", "eos_token_id", "special_tokens_map")
    return len(tokenizer) == len(other) and all(getattr(tokenizer, name) == getattr(other, name) for name in names)
