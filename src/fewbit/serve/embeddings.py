# SPDX-License-Identifier: Apache-2.0
"""One vector a text, of length one: the mean of a model's last hidden states, or what the folder's notes for
sentence-transformers name instead. Runs in transformers, for an encoder as well as for a causal model."""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.containers import manifest as M
from fewbit.containers.files import read_json
from fewbit.decode.text import Words
from fewbit.errors import InputError, UnsupportedError
from fewbit.serve.errors import ApiError

if TYPE_CHECKING:
    from torch import Tensor

MOST_TEXTS = 256
TOGETHER = 16
"""Texts of one pass."""
POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
"""Switches of sentence-transformers' ``1_Pooling/config.json`` that are known here."""
FIELDS = frozenset({"model", "input", "encoding_format", "user"})


class Embedder:
    """``model``: of transformers, in eval mode; ``context``: tokens of a text at most; ``pooling``: which hidden states
    make a vector, "mean", "first" or "last"."""

    def __init__(self, model: Any, words: Words, context: int, pooling: str = "mean") -> None:
        self._model, self._words, self.context, self._pooling = model, words, context, pooling
        self._one = threading.Lock()  # a pass at a time: two would only share the same cores

    def tokens(self, found: Any) -> list[list[int]]:
        """The texts of a request, each a text or tokens. Raises ApiError and InputError."""
        if isinstance(found, str) or (isinstance(found, list) and found and type(found[0]) is int):
            found = [found]
        if not isinstance(found, list) or not 0 < len(found) <= MOST_TEXTS:
            raise ApiError(400, f"input is a text, tokens, or a list of 1 to {MOST_TEXTS} of these", "input")
        listed = [self._words.encode(one) if isinstance(one, str) else one for one in found]
        vocabulary = len(self._words.tokenizer)
        for one in listed:
            if not isinstance(one, list) or not one or not all(type(t) is int and 0 <= t < vocabulary for t in one):
                raise ApiError(400, "an input holds no token, or one that is not of the vocabulary", "input")
            if len(one) > self.context:
                message = f"an input has {len(one)} tokens, the context {self.context}"
                raise ApiError(400, message, "input", "context_length_exceeded")
        return listed

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(texts, width) float32, rows of length one. Texts of like length share a pass."""
        import torch

        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rows: list[Tensor] = [torch.empty(0)] * len(texts)
        for begin in range(0, len(order), TOGETHER):
            some = order[begin : begin + TOGETHER]
            with self._one:
                vectors = self._pass([texts[index] for index in some])
            for index, vector in zip(some, vectors, strict=True):
                rows[index] = vector
        return torch.stack(rows)

    def _pass(self, texts: Sequence[Sequence[int]]) -> Tensor:
        import torch

        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        with torch.inference_mode():
            output = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        hidden, weight = output.hidden_states[-1].float(), mask[..., None].float()
        if self._pooling == "mean":
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        else:
            places = mask.sum(1) - 1 if self._pooling == "last" else torch.zeros(len(texts), dtype=torch.long)
            pooled = hidden[torch.arange(len(texts)), places]
        return torch.nn.functional.normalize(pooled, dim=-1)


def is_encoder(folder: Path) -> bool:
    """Whether the model in ``folder`` reads texts and writes none, by the name of its architecture."""
    names = read_json(folder / "config.json").get("architectures") or []
    return bool(names) and not any(
        "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name for name in names
    )


def pooling_of(folder: Path) -> str:
    """How the model in ``folder`` was trained to make vectors; "mean" where it does not say.

    Raises:
        UnsupportedError: in a way that is not known here.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    on = [name for name, value in read_json(path).items() if name.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in POOLINGS:
        raise UnsupportedError(f"embeddings of {folder}", f"{path.name} says {on}", f"one of {', '.join(POOLINGS)}")
    return POOLINGS[on[0]]


def embedder(folder: Path, words: Words) -> Embedder:
    """The model in ``folder`` for embeddings.

    Raises:
        InputError: there is none that transformers can load.
    """
    from transformers import AutoModel

    from fewbit.integrations.load import load
    from fewbit.model.classes import from_folder

    try:
        if (folder / M.NAME).is_file():
            model = load(folder)
        elif is_encoder(folder):
            model = AutoModel.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).eval()
        else:
            model = from_folder(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"the model in {folder}", " ".join(str(error).split())[:300]) from error
    limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
    own = words.tokenizer.model_max_length
    return Embedder(model, words, min(limit, int(own)) if own else limit, pooling_of(folder))


def answer(embedder: Embedder, body: Mapping[str, Any], model: str) -> dict[str, Any]:
    """OpenAI's list of embeddings. Raises ApiError and InputError."""
    given = {name: value for name, value in body.items() if value is not None}
    unknown = sorted(given.keys() - FIELDS)
    if unknown:
        raise ApiError(400, f"{unknown[0][:100]!r} is not supported by this server", unknown[0][:100])
    encoding = given.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise ApiError(400, "encoding_format is float or base64", "encoding_format")
    texts = embedder.tokens(given.get("input"))
    vectors = embedder.embed(texts)
    count = sum(map(len, texts))
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, encoding)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "model": model, "data": data, "usage": usage}


def _written(vector: Tensor, encoding: str) -> list[float] | str:
    if encoding == "base64":  # little-endian float32, as the openai package reads it
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return [float(value) for value in vector.tolist()]
