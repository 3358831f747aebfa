# SPDX-License-Identifier: Apache-2.0
"""Real models behind the server: a trained Llama through transformers, tiny ones, and vectors of texts."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewbit.commands import serve as command
from fewbit.decode.batch import Batcher, Limits
from fewbit.decode.text import words_of
from fewbit.decode.transformers_engine import TransformersEngine
from fewbit.errors import UnsupportedError
from fewbit.model.classes import from_folder
from fewbit.serve import embeddings as E
from fewbit.serve.app import Served

STORIES = Path("/work/shared/assets/stories15m")
PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play in the sunshine with her dog"


def greedy(folder: Path, prompt: str, count: int) -> str:
    """What transformers' own loop writes."""
    words, model = words_of(folder), from_folder(folder)
    ids = torch.tensor([words.encode(prompt)])
    with torch.inference_mode():
        found = model.generate(ids, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(ids))[
            0
        ].tolist()
    before = words.decode(found[: ids.shape[1]])
    return words.decode(found)[len(before) :]


@pytest.mark.model
@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared model stories15m is not here")
def test_a_trained_model_tells_its_story_to_many(serve: Callable[[Served], Any]) -> None:
    import threading

    words = words_of(STORIES)
    engine = TransformersEngine(from_folder(STORIES), None, sequences=10)
    running = serve(
        Served("stories", words, Batcher(engine, words, Limits(running=8, kept=2)), token="a-token-for-tests")
    )
    expected, found = greedy(STORIES, PROMPT, 40), {}
    assert len(expected) > 60

    def client(number: int) -> None:
        create = running.openai().completions.create
        options: dict[str, Any] = {"model": "stories", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        if number % 2:
            found[number] = "".join(chunk.choices[0].text for chunk in create(**options, stream=True))
        else:
            found[number] = create(**options).choices[0].text

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert list(found.values()) == [expected] * 6
    assert running.served.batcher.stats().reused_tokens > 0


def test_the_command_serves_what_it_was_given(tiny: Path, serve: Callable[[Served], Any]) -> None:
    asked = command.Request(tiny, sequences=2, kept=1, context=100, max_tokens=9, embeddings=True, name="small")
    running = serve(command.serve(asked, "a-token-for-tests"))
    create = running.openai().completions.create
    found = create(model="small", prompt="hello", temperature=0, extra_body={"ignore_eos": True})
    assert found.usage.completion_tokens == 9
    assert found.choices[0].text == greedy(tiny, "hello", 9)
    assert running.served.hosts is not None and "127.0.0.1" in running.served.hosts
    assert running.post("/v1/completions", {"model": "small", "prompt": "a", "max_tokens": 10}).status_code == 400
    missing = running.post("/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "a"}]})
    assert missing.status_code == 400 and "chat template" in missing.json()["error"]["message"]


def test_vectors_of_a_causal_model(tiny: Path, serve: Callable[[Served], Any]) -> None:
    words = words_of(tiny)
    running = serve(Served("tiny", words, embedder=E.embedder(tiny, words), token="a-token-for-tests"))
    texts = ["one", "a longer text than the other", "two"]
    create = running.openai().embeddings.create
    found = create(model="tiny", input=texts)  # in base64, which the package asks for
    model = from_folder(tiny)
    for text, row in zip(texts, found.data, strict=True):
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.tensor([words.encode(text)])).last_hidden_state[0].double()
        mean = (hidden.mean(0) / hidden.mean(0).norm()).numpy()
        np.testing.assert_allclose(row.embedding, mean, atol=1e-5)  # float32 through two blocks, padded or not
    assert [row.index for row in found.data] == [0, 1, 2] and found.usage.prompt_tokens == sum(map(len, texts))
    plain = create(model="tiny", input=words.encode("one"), encoding_format="float").data[0].embedding
    np.testing.assert_allclose(plain, found.data[0].embedding, atol=1e-6)
    raw = running.post("/v1/embeddings", {"model": "tiny", "input": "one", "encoding_format": "base64"}).json()
    assert np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4").tolist() == pytest.approx(
        plain, abs=1e-6
    )


@pytest.mark.parametrize(("switch", "place"), [("pooling_mode_cls_token", 0), ("pooling_mode_lasttoken", -1)])
def test_vectors_are_pooled_as_the_folder_says(tiny: Path, tmp_path: Path, switch: str, place: int) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    notes = folder / "1_Pooling" / "config.json"
    notes.write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": False, switch: True}))
    words, model = words_of(folder), from_folder(folder)
    texts = [words.encode("a text"), words.encode("another text")]
    for text, vector in zip(texts, E.embedder(folder, words).embed(texts), strict=True):
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.tensor([text])).last_hidden_state[0, place]
        torch.testing.assert_close(vector, hidden / hidden.norm(), atol=1e-5, rtol=0)
    notes.write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(UnsupportedError, match="weightedmean"):
        E.embedder(folder, words)


@pytest.mark.parametrize(
    "change",
    [
        {"input": None},
        {"input": []},
        {"input": ""},
        {"input": [""]},
        {"input": [1, "a"]},
        {"input": [10**9]},
        {"input": ["a"] * 257},
        {"input": "a" * 600},
        {"input": {"a": 1}},
        {"encoding_format": "int8"},
        {"dimensions": 8},
    ],
)
def test_nonsense_is_refused(tiny: Path, serve: Callable[[Served], Any], change: dict[str, Any]) -> None:
    words = words_of(tiny)
    running = serve(Served("tiny", words, embedder=E.embedder(tiny, words), token="a-token-for-tests"))
    assert running.post("/v1/embeddings", {"model": "tiny", "input": "a", **change}).status_code == 400
    assert running.post("/v1/embeddings", {"model": "tiny", "input": "a"}).status_code == 200


def test_an_encoder_writes_no_text(
    tmp_path: Path, byte_tokenizer: Callable[[Path], int], serve: Callable[[Served], Any]
) -> None:
    from transformers import BertConfig, BertModel

    vocabulary = byte_tokenizer(tmp_path)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path)
    running = serve(command.serve(command.Request(tmp_path, name="bert"), "a-token-for-tests"))
    vectors = running.openai().embeddings.create(model="bert", input=["a", "b"]).data
    assert len(vectors) == 2 and len(vectors[0].embedding) == 32
    response = running.post("/v1/completions", {"model": "bert", "prompt": "a"})
    assert response.status_code == 501 and "reads texts" in response.json()["error"]["message"]
