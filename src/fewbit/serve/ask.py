# SPDX-License-Identifier: Apache-2.0
"""What a request for a text asks: OpenAI's fields, checked. What cannot be done is refused, not left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbit.decode.sampling import Sampling
from fewbit.decode.text import Words
from fewbit.errors import SpecError
from fewbit.serve.errors import ApiError

MOST_CHOICES = 16
"""Texts of one request."""
MOST_TOKENS = 1 << 31
"""Of a text, whatever the context."""
COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that names none, as OpenAI has it; a chat goes on to the end of the context."""
NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "ignore_eos",
)
"""Fields that :class:`Sampling` knows by the same name; those that OpenAI lacks have vLLM's names."""
UNHEEDED = frozenset(
    {
        "cache_prompt",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields that are about the sender, the billing or caches (llama.cpp's ``cache_prompt``) and change no text."""
SHARED = UNHEEDED | {*NUMBERS, "model", "stream", "stream_options", "n", "stop", "logit_bias", "logprobs", "max_tokens"}
COMPLETION = SHARED | {"prompt", "echo"}
CHAT = SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
}
"""Fields of things that are not done here, and the values that ask for none of them."""
CALLS = {"tools": "tool_choice", "functions": "function_call"}
"""What a model may call -> the field that says whether it shall. Where that is "none", templates are told of nothing
that could be called, so that no text looks like a call."""
MESSAGE = frozenset({"role", "content", "name"})
IN_MESSAGE: dict[str, tuple[Any, ...]] = {"annotations": ([],), "tool_calls": ([],)}
"""As :data:`NEUTRAL`, of a message: answers of other servers come back with them."""
ROLES = {"developer": "system"}
"""Roles by OpenAI's newer names -> those that templates know."""


@dataclass(frozen=True)
class Ask:
    """``prompts``: tokens; ``n`` texts follow each. ``limit``: the field by which a text's tokens are bounded.
    ``echo``: the texts of the prompts, where each answer begins with its own."""

    chat: bool
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    n: int
    stream: bool
    include_usage: bool
    limit: str
    echo: tuple[str, ...] = ()


def completion(body: Mapping[str, Any], words: Words) -> Ask:
    """A request of /v1/completions. Raises ApiError and the errors of tokenizing."""
    given = _known(_all_of_best(body), COMPLETION)
    asked = _listed(given.get("prompt"))
    prompts = tuple(_prompt(one, words) for one in asked)
    ask = _ask(False, prompts, given, given.get("logprobs"))
    if not _flag(given, "echo"):
        return ask
    texts = [one if isinstance(one, str) else words.decode(one) for one in asked]
    return dataclasses.replace(ask, echo=tuple(texts))


def chat(body: Mapping[str, Any], words: Words) -> Ask:
    """A request of /v1/chat/completions. Raises as :func:`completion`."""
    given = _known(_uncalled(body), CHAT)
    prompt = tuple(words.chat(_messages(given.get("messages"))))
    wanted = _flag(given, "logprobs")
    if "top_logprobs" in given and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return _ask(True, (prompt,), given, given.get("top_logprobs", 0) if wanted else None)


def _ask(chat: bool, prompts: tuple[tuple[int, ...], ...], given: Mapping[str, Any], logs: Any) -> Ask:
    n = _whole(given, "n", 1, 1, MOST_CHOICES)
    if n * len(prompts) > MOST_CHOICES:
        raise ApiError(400, f"{n * len(prompts)} texts in one request; at most {MOST_CHOICES} would work", "n")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, 'stream_options knows {"include_usage": true}', "stream_options")
    limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    most = _whole(given, limit, 1, int(chat), MOST_TOKENS) if limit in given else None
    sampling = _sampling(given, most, logs)
    return Ask(chat, prompts, sampling, n, _flag(given, "stream"), _flag(options, "include_usage"), limit)


def _sampling(given: Mapping[str, Any], most: int | None, logs: Any) -> Sampling:
    fields = {name: given[name] for name in NUMBERS if name in given}
    if fields.get("top_k") == -1:  # as vLLM spells "all"
        fields["top_k"] = 0
    if not isinstance(fields.get("ignore_eos", False), bool):
        raise ApiError(400, "ignore_eos is true or false", "ignore_eos")
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list):
        raise ApiError(400, "stop is a text or a list of texts", "stop")
    try:
        sampling = Sampling(**fields, stop=tuple(stop), logit_bias=_biases(given), max_tokens=most, logprobs=logs)
    except SpecError as error:
        name = error.asked.split()[0]
        raise ApiError(400, str(error), name if name in SHARED else None) from None
    return sampling.seeded()


def _biases(given: Mapping[str, Any]) -> dict[int, float]:
    found = given.get("logit_bias", {})
    if not isinstance(found, dict) or not all(key.isdecimal() and len(key) < 12 for key in found):
        raise ApiError(400, 'logit_bias is an object such as {"42": -100}', "logit_bias")
    return {int(key): value for key, value in found.items()}


def _known(
    found: Mapping[str, Any], names: frozenset[str], neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL, where: str = ""
) -> dict[str, Any]:
    """The fields of ``found`` that are given; null is not given. ``where``: goes before the name of a field."""
    given = {name: value for name, value in found.items() if value is not None}
    for name in [name for name in given if name in neutral and name not in names]:
        if not any(given[name] == value and type(given[name]) is type(value) for value in neutral[name]):
            works = f'; {CALLS[name]} "none" would work' if name in CALLS else ""
            message = f"{where}{name} is not supported by this server{works}"
            raise ApiError(400, message, where + name, "unsupported_parameter")
        del given[name]
    unknown = sorted(given.keys() - names)
    if unknown:
        name = where + unknown[0][:100]
        raise ApiError(400, f"unknown field {name!r}", name, "unknown_parameter")
    return given


def _all_of_best(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` without ``best_of`` where all of the best are returned: nothing is to be chosen then."""
    best = body.get("best_of")
    plain = type(best) is int and best == body.get("n")
    return {name: value for name, value in body.items() if not (plain and name == "best_of")}


def _uncalled(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` without tools that are not to be called."""
    idle = [name for name, choice in CALLS.items() if body.get(choice) == "none" and isinstance(body.get(name), list)]
    return {name: value for name, value in body.items() if name not in idle}


def _listed(found: Any) -> list[Any]:
    """Prompts, given as a text, tokens, or a list of one of these."""
    listed = found if isinstance(found, list) and found and isinstance(found[0], (str, list)) else [found]
    if len(listed) > MOST_CHOICES:
        raise ApiError(400, f"{len(listed)} prompts; at most {MOST_CHOICES} would work", "prompt")
    return listed


def _prompt(found: Any, words: Words) -> tuple[int, ...]:
    if isinstance(found, str):
        found = words.encode(found)
        if not found:
            raise ApiError(400, "the prompt holds no token; some text would work", "prompt")
    if isinstance(found, list) and found and all(type(token) is int for token in found):
        return tuple(found)
    raise ApiError(400, "prompt is a text, a list of texts, a list of tokens, or a list of such lists", "prompt")


def _messages(found: Any) -> list[dict[str, str]]:
    if not isinstance(found, list) or not found:
        raise ApiError(400, "messages is a list of one message at least", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(found)]


def _message(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not isinstance(found.get("role"), str):
        raise ApiError(400, f'{where} is an object with "role" and "content"', where)
    given = _known(found, MESSAGE, IN_MESSAGE, f"{where}.")
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise ApiError(400, f"the content of {where} is a text or a list of text parts", f"{where}.content")
    if not isinstance(given.get("name", ""), str):
        raise ApiError(400, f"the name in {where} is a text", f"{where}.name")
    return {**given, "role": ROLES.get(given["role"], given["role"]), "content": content}


def _part(found: Any, where: str) -> str:
    """Of a message; only texts can be read here."""
    if not isinstance(found, dict) or found.get("type") != "text" or not isinstance(found.get("text"), str):
        kind = found.get("type") if isinstance(found, dict) else None
        raise ApiError(400, f"{where} is of type {str(kind)[:100]!r}; only texts can be read here", where)
    return str(found["text"])


def _whole(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise ApiError(400, f"{name} is a whole number from {least} to {most}", name)
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} is true or false", name)
    return value
