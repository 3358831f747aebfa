# SPDX-License-Identifier: Apache-2.0
"""Text through vision-language models, in the native runtime: what transformers answers where no image is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.decode import described, image, open_engine
from fewbit.decode.native_engine import NativeEngine
from fewbit.decode.text import ends_of
from fewbit.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module here")

FAMILIES = ["gemma3-vision", "llava", "mistral3", "idefics3", "smolvlm", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
FAMILIES += ["qwen3-vl-moe"]
TOKENS = [int(token) for token in torch.randint(3, 59, (40,), generator=torch.Generator().manual_seed(3))]


def opened(folder: Path) -> NativeEngine:
    engine = open_engine(folder, kv="float32")
    assert isinstance(engine, NativeEngine), engine.why
    return engine


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "defaults"])
def test_logits_are_those_of_transformers(tiny_family: Callable[[str], Path], family: str, stated: bool) -> None:
    from transformers import AutoModelForImageTextToText

    folder = tiny_family(family)
    if not stated:  # as older files have it: transformers' class fills in the rest
        config = json.loads((folder / "config.json").read_text())
        del config["text_config"]["rms_norm_eps"]
        (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].float()
    torch.testing.assert_close(opened(folder).every_logit(TOKENS), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_what_is_quantized_are_those_of_transformers(
    tmp_path: Path, tiny_family: Callable[[str], Path], family: str
) -> None:
    folder = tiny_family(family)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    fewbit.quantize(folder, "int8/g8", out=(folder := tmp_path / "out"), force=True)
    model = fewbit.load(folder)
    ids, count = torch.tensor([TOKENS[:20]]), {"max_new_tokens": 256, "min_new_tokens": 256}
    with torch.inference_mode():
        expected = model.generate(input_ids=ids, **count, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 20:]
    engine = opened(folder)
    text, found, news = engine.open(), [], TOKENS[:20]
    for _ in range(256):
        news = [int(engine.feed([(text, news)])[0].argmax())]
        found += news
    assert found == expected.tolist()


def test_an_image_of_what_is_quantized_holds_the_text(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    out = tmp_path / "out"
    fewbit.quantize(tiny_family("gemma3-vision"), "int8/g32", out=out, force=True)
    with torch.inference_mode():
        expected = fewbit.load(out)(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].float()
    torch.testing.assert_close(opened(out).every_logit(TOKENS), expected, rtol=1e-4, atol=5e-5)
    image.write(described.described(out, None), out, None)
    again = opened(out)
    assert again.model.image is not None
    torch.testing.assert_close(again.every_logit(TOKENS), expected, rtol=1e-4, atol=5e-5)


def test_a_text_ends_where_the_text_half_says(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("llava")
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert json.loads((folder / "config.json").read_text())["text_config"]["eos_token_id"] == 2
    assert ends_of(folder) == {2}
