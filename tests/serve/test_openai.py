# SPDX-License-Identifier: Apache-2.0
"""The real `openai` package against the server: it must find every field where it looks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fewbit.decode.batch import Limits

openai = pytest.importorskip("openai")

TALK = [{"role": "system", "content": "short"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
PROMPT = "<system>short\n<user>hello\n<assistant>"


def expected(running: Any, prompt: str, count: int) -> str:
    words = running.served.words
    return words.decode(running.served.batcher.engine.after(words.encode(prompt), count))


def test_models(fake: Callable[..., Any]) -> None:
    client = fake().openai()
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "fewbit"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")


def test_a_completion(fake: Callable[..., Any]) -> None:
    running = fake()
    found = running.openai().completions.create(model="fake", prompt="hello", max_tokens=20, temperature=0)
    assert found.choices[0].text == expected(running, "hello", 20)
    assert found.choices[0].finish_reason == "length" and found.object == "text_completion"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (5, 20, 25)
    short = running.openai().completions.create(model="fake", prompt="hello", temperature=0)
    assert short.usage.completion_tokens == 16


def test_a_streamed_completion_is_the_whole_one(fake: Callable[..., Any]) -> None:
    running = fake()
    chunks = list(
        running.openai().completions.create(model="fake", prompt="hello", max_tokens=20, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(running, "hello", 20)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 19 + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat(fake: Callable[..., Any]) -> None:
    running = fake()
    create = running.openai().chat.completions.create
    found = create(model="fake", messages=TALK, max_completion_tokens=20, temperature=0)
    assert found.choices[0].message.content == expected(running, PROMPT, 20)
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    assert found.usage.prompt_tokens == len(PROMPT)
    again = create(model="fake", messages=TALK, max_tokens=20, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens == len(PROMPT) - 1
    assert again.choices == found.choices
    to_the_end = create(model="fake", messages=TALK, temperature=0)
    assert to_the_end.usage.total_tokens == 512


def test_a_streamed_chat(fake: Callable[..., Any]) -> None:
    running = fake()
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 20}
    chunks = list(running.openai().chat.completions.create(model="fake", messages=TALK, **options))
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected(running, PROMPT, 20)
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == 20
    assert all(part.usage is None for part in parts)


def test_several_choices_and_prompts(fake: Callable[..., Any]) -> None:
    running = fake()
    create = running.openai().completions.create
    found = create(model="fake", prompt=["one", "two"], n=3, seed=5, temperature=3, max_tokens=12)
    assert [choice.index for choice in found.choices] == list(range(6))
    texts = [choice.text for choice in found.choices]
    assert len(set(texts)) == 6
    assert found.usage.prompt_tokens == 6 and found.usage.completion_tokens == 72
    streamed = [""] * 6
    for chunk in create(model="fake", prompt=["one", "two"], n=3, seed=5, temperature=3, max_tokens=12, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    best = create(model="fake", prompt=["one", "two"], n=3, best_of=3, seed=5, temperature=3, max_tokens=12)
    assert [choice.text for choice in best.choices] == texts
    tokens = running.served.words.encode("two")
    assert create(model="fake", prompt=tokens, seed=5, temperature=3, max_tokens=12).choices[0].text == texts[3]


def test_stop_strings(fake: Callable[..., Any]) -> None:
    running = fake()
    whole = expected(running, "hello", 40)
    create = running.openai().completions.create
    found = create(model="fake", prompt="hello", max_tokens=40, temperature=0, stop=[whole[9:12], "\n\n"])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (whole[:9], "stop")
    chunks = list(create(model="fake", prompt="hello", max_tokens=40, temperature=0, stop=whole[9:12], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:9]
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_of_the_text_before_a_stop_string(fake: Callable[..., Any], stream: bool) -> None:
    running = fake()
    client = running.openai()
    options: dict[str, Any] = {"model": "fake", "temperature": 0, "max_tokens": 40, "stream": stream}
    whole = expected(running, "hello", 40)
    found = client.completions.create(prompt="hello", logprobs=1, stop=[whole[9:12]], **options)
    parts = [chunk.choices[0] for chunk in (found if stream else [found])]
    assert "".join(part.text for part in parts) == whole[:9]
    tables = [part.logprobs for part in parts if part.logprobs]
    assert "".join(token for table in tables for token in table.tokens) == whole[:9]
    assert [place for table in tables for place in table.text_offset] == list(range(9))
    whole = expected(running, PROMPT, 40)
    found = client.chat.completions.create(messages=TALK, logprobs=True, stop=[whole[9:12]], **options)
    logs = [chunk.choices[0].logprobs for chunk in (found if stream else [found])]
    assert "".join(entry.token for log in logs if log for entry in log.content) == whole[:9]


def test_tools_that_are_not_to_be_called(fake: Callable[..., Any]) -> None:
    create = fake().openai().chat.completions.create
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    options: dict[str, Any] = {"model": "fake", "messages": TALK, "temperature": 0, "max_tokens": 20}
    plain = create(**options)
    for more in (
        {"tools": tools, "tool_choice": "none"},
        {"functions": [tools[0]["function"]], "function_call": "none"},
    ):
        found = create(**options, **more)
        assert found.choices == plain.choices and found.usage.prompt_tokens == plain.usage.prompt_tokens
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}, {"tool_choice": tools[0]}):
        with pytest.raises(openai.BadRequestError, match="not supported") as refused:
            create(**options, tools=tools, **choice)
        assert refused.value.code == "unsupported_parameter" and refused.value.param in ("tools", "tool_choice")


def test_logprobs_of_a_chat(fake: Callable[..., Any]) -> None:
    create = fake().openai().chat.completions.create
    options = {"model": "fake", "messages": TALK, "logprobs": True, "temperature": 0, "max_tokens": 5}
    found = create(**options, top_logprobs=2).choices[0]
    content = found.logprobs.content
    assert "".join(entry.token for entry in content) == found.message.content
    assert all(entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob > entry.top_logprobs[1].logprob for entry in content)
    assert bytes(content[0].bytes).decode() == content[0].token
    streamed = [c.choices[0].logprobs for c in create(**options, stream=True)]
    assert [one.content[0].token for one in streamed if one] == [entry.token for entry in content]


def test_logprobs_of_a_completion(fake: Callable[..., Any]) -> None:
    create = fake().openai().completions.create
    found = create(model="fake", prompt="hello", logprobs=3, temperature=0, max_tokens=5).choices[0]
    table = found.logprobs
    assert "".join(table.tokens) == found.text and table.text_offset == [0, 1, 2, 3, 4]
    assert table.token_logprobs == [max(top.values()) for top in table.top_logprobs]


@pytest.mark.parametrize("echo", [False, True])
def test_places_in_a_stream_are_those_in_the_whole(fake: Callable[..., Any], echo: bool) -> None:
    running = fake()
    text = expected(running, "hello", 12)
    options = {"model": "fake", "prompt": "hello", "temperature": 0, "max_tokens": 12, "logprobs": 1, "echo": echo}
    options["stop"] = [text[3:6] + "never"]  # what could become it is held back
    create = running.openai().completions.create
    whole = create(**options).choices[0]
    parts = [chunk.choices[0] for chunk in create(**options, stream=True)]
    assert 4 in [len(part.text) for part in parts] and "".join(part.text for part in parts) == whole.text
    assert all(len(part.text) == len(part.logprobs.tokens) for part in parts[1:])
    places = [place for part in parts if part.logprobs for place in part.logprobs.text_offset]
    assert places == whole.logprobs.text_offset == list(range(len(whole.text)))


def test_an_echo_is_the_prompt_and_what_the_model_thinks_of_it(fake: Callable[..., Any]) -> None:
    create = fake().openai().completions.create
    options: dict[str, Any] = {"model": "fake", "prompt": ["hello", [43, 44]], "temperature": 0, "max_tokens": 5}
    plain = create(**options, logprobs=3).choices
    read = create(**{**options, "max_tokens": 0}, echo=True, logprobs=3)
    both = create(**options, echo=True, logprobs=3).choices
    assert [choice.text for choice in read.choices] == ["hello", "JK"] and read.usage.completion_tokens == 0
    for prompt, added, whole in zip(read.choices, plain, both, strict=True):
        assert whole.text == prompt.text + added.text and prompt.finish_reason == "length"
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            found = getattr(prompt.logprobs, name)
            assert getattr(whole.logprobs, name) == found + getattr(added.logprobs, name)
            assert (found[0] is None) == (name != "tokens") and len(found) == len(prompt.text)
        assert whole.logprobs.text_offset == list(range(len(whole.text)))
    streamed = ["", ""], [[], []]
    for chunk in create(**options, echo=True, logprobs=3, stream=True):
        choice = chunk.choices[0]
        streamed[0][choice.index] += choice.text
        streamed[1][choice.index] += choice.logprobs.token_logprobs
    assert streamed == ([choice.text for choice in both], [choice.logprobs.token_logprobs for choice in both])
    bare = create(**options, echo=True).choices
    assert [(c.text, c.logprobs) for c in bare] == [(choice.text, None) for choice in both]


def test_no_token_is_written_where_none_may_be(fake: Callable[..., Any]) -> None:
    create = fake().openai().completions.create
    found = create(model="fake", prompt="hello", max_tokens=0, n=2)
    assert [(c.text, c.finish_reason) for c in found.choices] == [("", "length")] * 2
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (5, 0)
    chunks = list(create(model="fake", prompt="hello", max_tokens=0, echo=True, stream=True))
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [("hello", "length")]


def test_seeds_biases_and_fields_of_ours(fake: Callable[..., Any]) -> None:
    create = fake().openai().completions.create
    options: dict[str, Any] = {"model": "fake", "prompt": "hello", "max_tokens": 12}
    first, second = (create(**options, seed=3, temperature=4).choices[0].text for _ in range(2))
    assert first == second != create(**options, seed=4, temperature=4).choices[0].text
    assert create(**options, logit_bias={"40": 100}, temperature=0).choices[0].text == "G" * 12
    ours = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    assert (
        create(**options, extra_body=ours, temperature=4).choices[0].text
        == create(**options, temperature=0).choices[0].text
    )
    assert create(**options, user="me", extra_body={"tools": [], "top_k": -1}).choices[0].text


def test_what_the_model_cannot_do_is_an_error_of_the_package(fake: Callable[..., Any]) -> None:
    running = fake(Limits(running=1, waiting=1), seconds=0.02)
    client = running.openai()
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model="fake", prompt="x" * 512)
    assert found.value.code == "context_length_exceeded" and found.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as found:
        client.completions.create(model="gpt-4", prompt="x")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        running.openai(api_key="wrong-token").models.list()
    with pytest.raises(openai.RateLimitError, match="waiting"):
        client.completions.create(model="fake", prompt="x", n=5)
    with pytest.raises(openai.APIStatusError) as found:
        client.embeddings.create(model="fake", input="x")
    assert found.value.status_code == 501 and found.value.code == "embeddings_not_loaded"
    assert client.completions.create(model="fake", prompt="x", max_tokens=2).choices[0].text


def test_an_error_in_the_middle_of_a_stream(fake: Callable[..., Any]) -> None:
    running = fake(hollow=40)
    create = running.openai().completions.create
    tokens = [5, 6, 7]
    with pytest.raises(openai.APIError, match="finite"):
        list(create(model="fake", prompt=tokens, stream=True, logit_bias={"40": 100}))
    with pytest.raises(openai.BadRequestError, match="finite"):
        create(model="fake", prompt=tokens, logit_bias={"40": 100})
    assert create(model="fake", prompt=tokens, logit_bias={"40": -100}, max_tokens=3).choices[0].text


def test_many_at_once(fake: Callable[..., Any]) -> None:
    import asyncio

    running = fake(Limits(running=8))
    prompts = [f"client {number} " * (1 + number % 4) for number in range(24)]

    async def one(client: Any, prompt: str) -> str:
        stream = await client.completions.create(model="fake", prompt=prompt, temperature=0, max_tokens=30, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="a-token-for-tests") as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert asyncio.run(all_of_them()) == [expected(running, prompt, 30) for prompt in prompts]
