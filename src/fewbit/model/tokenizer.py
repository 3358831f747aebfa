# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a folder: where ``tokenizer.json`` says all, without transformers, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fewbit.containers.files import LARGEST_JSON, LARGEST_SIDECAR, read_json, size_of
from fewbit.errors import CorruptFileError, InputError, first_line
from fewbit.model.part_tokenizer import open_part
from fewbit.model.tokenizer_file import read_whole

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""That transformers makes a tokenizer of."""
NUMBERED = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt")
"""Those of them that say which token is which row of the embedding. The others hold what people edit: templates, and
what tokens are for."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Those of which a folder with a tokenizer holds one."""
CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of transformers that take ``tokenizer.json`` as it is; others build theirs from parts of it."""
LLAMA = "LlamaTokenizer"
"""One that takes vocabulary and merges from it alone: it is followed where the file describes the rest as the class has
it, see :func:`_as_llama`."""
SPACE = "\u2581"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CHANGING = ("add_bos_token", "add_eos_token", "split_special_tokens", "added_tokens_decoder", "fix_mistral_regex")
"""Settings beside the file by which transformers would change what it says."""
TEMPLATE = "chat_template.jinja"
Fits = Callable[[Any, dict[str, Any]], bool]


class FileTokenizer:
    """As much of a tokenizer of transformers as is used here, by the same names."""

    def __init__(self, tokenizer: Any, config: dict[str, Any], template: str | None) -> None:
        """``tokenizer``: of the package tokenizers, or a
        :class:`fewbit.model.part_tokenizer.PartTokenizer`. ``config``: what ``tokenizer_config.json`` holds."""
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.chat_template = template
        self.special_tokens_map = {name: config[name] for name in NAMED if config.get(name) is not None}
        self.model_max_length = config.get("model_max_length") or 0
        self.bos_token_id, self.eos_token_id = (
            None if (token := self.special_tokens_map.get(name)) is None else tokenizer.token_to_id(token)
            for name in ("bos_token", "eos_token")
        )

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(
        self, tokens: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """What the vocabulary calls ``token``."""
        found: str | None = self._tokenizer.id_to_token(token)
        return found


def has_tokenizer(folder: Path) -> bool:
    """Whether there is one in ``folder``: transformers would make up an empty one."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def of_transformers(folder: Path) -> Any:
    """What transformers makes of the tokenizer in ``folder``, whose code, if it brings any, is never run.

    Raises:
        InputError: there is none, or it cannot be read. CorruptFileError: a file is larger than a tokenizer's.
    """
    asked = f"the tokenizer of {folder}"
    if not folder.is_dir():
        raise InputError(asked, "there is no such folder", "a folder that `fewbit quantize` wrote works")
    if not has_tokenizer(folder):
        raise InputError(asked, "the folder has none", "copy the original's tokenizer files there")
    for path in (folder / name for name in FILES):
        if path.is_file() and size_of(path) > LARGEST_SIDECAR:
            raise CorruptFileError(f"reading {path}", f"it has {size_of(path)} bytes", f"at most {LARGEST_SIDECAR}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise bare Exception
        raise InputError(asked, first_line(error), "the tokenizer files of the model, whole") from error


def open_tokenizer(folder: Path, once: bool = False) -> FileTokenizer | None:
    """The tokenizer in ``folder``; None where it takes transformers to read it. ``once``: for one text, which takes
    less time and memory; the second takes more of both. No two threads may ask such a one at a time.

    Raises:
        InputError, CorruptFileError: a file is no JSON object.
    """
    file, beside = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not (file.is_file() and beside.is_file()) or (folder / "special_tokens_map.json").is_file():
        return None
    config = read_json(beside)
    template = config.get("chat_template")
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    several = (folder / "additional_chat_templates").is_dir()
    if several or not isinstance(template, str | None) or not _plain(config) or size_of(file) > LARGEST_JSON:
        return None
    return read_file(file, config, template, once, _as_transformers)


def read_file(
    file: Path, config: dict[str, Any], template: str | None, once: bool, fits: Fits = lambda tokenizer, config: True
) -> FileTokenizer | None:
    """The tokenizer that ``file`` describes, where the package tokenizers can read it, ``fits(tokenizer, config)``."""
    part = open_part(file) if once else None
    if part is not None and fits(part.rest, config):
        return FileTokenizer(part, config, template)
    whole = read_whole(file)
    return None if whole is None or not fits(whole, config) else FileTokenizer(whole, config, template)


def _as_transformers(tokenizer: Any, config: dict[str, Any]) -> bool:
    """Whether transformers would use ``tokenizer`` as it is after this, which may set how spaces are put."""
    if config["tokenizer_class"] == LLAMA and not _as_llama(tokenizer, config):
        return False
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return tokenizer.post_processor is not None and special.issuperset(_special(config))


def _plain(config: dict[str, Any]) -> bool:
    """Whether transformers would use what ``tokenizer.json`` describes without adding to it."""
    if config.get("tokenizer_class") not in (*CLASSES, LLAMA) or any(name in config for name in CHANGING):
        return False
    return all(isinstance(token, str) for token in _special(config))


def _as_llama(tokenizer: Any, config: dict[str, Any]) -> bool:
    """Whether the class would take ``tokenizer`` as it is but for spaces, which it puts before a text alone, where the
    file may put them after every special token too; these are set."""
    from tokenizers import decoders, models, pre_tokenizers

    def spaces(scheme: str) -> Any:
        return pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)

    def is_any(part: Any, *known: Any) -> bool:
        return part is not None and any(part.__getstate__() == each.__getstate__() for each in known)

    model, spoken = tokenizer.model, [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if config.get("legacy") or config.get("add_prefix_space") is False or not isinstance(model, models.BPE):
        return False
    if (model.fuse_unk, model.byte_fallback, model.dropout, model.unk_token) != (True, True, None, None):
        return False
    decoder = decoders.Sequence([*spoken, decoders.Strip(content=" ", left=1)])
    if tokenizer.normalizer is not None or not is_any(tokenizer.decoder, decoder):
        return False
    if not is_any(tokenizer.pre_tokenizer, spaces("first"), spaces("always")):
        return False
    tokenizer.pre_tokenizer = spaces("first")
    begun = [tokenizer.token_to_id(config.get("bos_token") or "<s>")]  # and nothing behind a text
    return bool(tokenizer.encode("a").ids == begun + tokenizer.encode("a", add_special_tokens=False).ids)


def _special(config: dict[str, Any]) -> list[Any]:
    """Tokens that are to stand for no text; anything that is no text is no token."""
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    named = [config[name] for name in NAMED if config.get(name) is not None]
    return [*named, *extra] if isinstance(extra, list) else [None]
