# SPDX-License-Identifier: Apache-2.0
"""The native runtime against transformers' own forward pass over the whole text, on tiny random models of each family.

Both compute in float32, in another order: logits agree within 2^-24 times the number of operations in a chain times
the magnitudes, here some hundreds of operations on numbers of about 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.decode import open_engine
from fewbit.decode.native_engine import NativeEngine
from fewbit.errors import CorruptFileError, InputError, UnsupportedError
from fewbit.kernels import native
from fewbit.model.classes import from_folder

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module here")

FAMILIES = ["llama", "llama-tied", "mistral", "ministral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3"]
FAMILIES += ["mixtral", "qwen2-moe", "qwen3-moe"]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
TOKENS = [int(token) for token in torch.randint(3, 67, (40,), generator=torch.Generator().manual_seed(3))]


def opened(folder: Path, **options: Any) -> NativeEngine:
    engine = open_engine(folder, **{"kv": "float32", **options})
    assert isinstance(engine, NativeEngine), engine.why
    return engine


def every_logit(folder: Path, tokens: list[int]) -> torch.Tensor:
    """transformers' logits after each token, (tokens, vocabulary)."""
    with torch.inference_mode():
        return from_folder(folder)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tiny_family: Callable[[str], Path], family: str) -> None:
    folder = tiny_family(family)
    expected, engine = every_logit(folder, TOKENS), opened(folder)
    one, other = engine.open(), engine.open()
    torch.testing.assert_close(engine.feed([(one, TOKENS)])[0], expected[-1], **CLOSE)
    for place, token in enumerate(TOKENS):  # token by token; windows of 4 begin to slide
        torch.testing.assert_close(engine.feed([(other, [token])])[0], expected[place], **CLOSE)


def test_scores_are_capped(tiny_family: Callable[[str], Path]) -> None:
    """A cap low enough to matter; transformers heeds it in its eager attention alone."""
    from transformers import AutoModelForCausalLM

    folder = tiny_family("gemma2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 0.02}))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0, -1]
    engine = opened(folder)
    torch.testing.assert_close(engine.feed([(engine.open(), TOKENS)])[0], expected, **CLOSE)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"sliding_window": 4}),
        ("llama", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
        ("llama", {"no_rope_layers": [0, 1]}),
        ("llama", {"query_pre_attn_scalar": 100, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0}),
        ("llama", {"hidden_activation": "gelu"}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),  # wins over rope_parameters
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "silu"}),  # which means the approximation by tanh
        ("gemma3", {"attn_logit_softcapping": 0.5}),
        ("mixtral", {"decoder_sparse_step": 2, "mlp_only_layers": [0], "norm_topk_prob": False}),
        ("qwen3-moe", {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_only_what_the_class_heeds_is_heeded(
    tiny_family: Callable[[str], Path], family: str, changes: dict[str, Any]
) -> None:
    """Of a configuration that another family's is mixed into, as converted checkpoints and advice for longer contexts
    have it."""
    folder = tiny_family(family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    expected, engine = every_logit(folder, TOKENS), opened(folder)
    torch.testing.assert_close(engine.every_logit(TOKENS), expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen2-moe"])
def test_keep_and_fork_are_recomputation(tiny_family: Callable[[str], Path], family: str) -> None:
    folder = tiny_family(family)
    engine = opened(folder)
    one = engine.open()
    engine.feed([(one, TOKENS[:30])])
    other = engine.fork(one, 11)
    assert (engine.length(one), engine.length(other)) == (30, 11)
    changed = TOKENS[:11] + TOKENS[25:]
    torch.testing.assert_close(engine.feed([(other, TOKENS[25:])])[0], every_logit(folder, changed)[-1], **CLOSE)
    torch.testing.assert_close(engine.feed([(one, TOKENS[30:])])[0], every_logit(folder, TOKENS)[-1], **CLOSE)
    engine.keep(one, 5)
    changed = TOKENS[:5] + TOKENS[20:]
    torch.testing.assert_close(engine.feed([(one, TOKENS[20:])])[0], every_logit(folder, changed)[-1], **CLOSE)


def test_sequences_do_not_see_one_another(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("gemma3")
    engine = opened(folder, sequences=4)
    parts = [TOKENS[:7], TOKENS[7:8], TOKENS[8:37], TOKENS[3:5]]
    together = engine.feed([(engine.open(), part) for part in parts])
    for part, logits in zip(parts, together, strict=True):
        torch.testing.assert_close(logits, every_logit(folder, part)[-1], **CLOSE)


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[[Path], int]) -> Path:
    """A random Llama with room for 700 positions: several blocks of the cache, several chunks of a pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "long"
    config = LlamaConfig(
        vocab_size=byte_tokenizer(folder),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=700,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


LONG = [int(token) for token in torch.randint(2, 258, (400,), generator=torch.Generator().manual_seed(5))]


def test_long_prefill_is_that_of_transformers(long_folder: Path) -> None:
    engine = opened(long_folder)
    torch.testing.assert_close(engine.feed([(engine.open(), LONG)])[0], every_logit(long_folder, LONG)[-1], **CLOSE)


@pytest.mark.parametrize("kv", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_chunked_prefill_is_token_by_token(long_folder: Path, kv: str) -> None:
    """How text is cut changes results only as the kernels' do with the number of tokens, even where keys and values are
    codes: those depend on the position alone. A rounding to a code or a shorter float may then fall the other way."""
    engine = opened(long_folder, kv=kv)
    whole, cut, single = engine.open(), engine.open(), engine.open()
    at_once = engine.feed([(whole, LONG[:300])])
    for begin, end in ((0, 3), (3, 100), (100, 164), (164, 165), (165, 299), (299, 300)):
        pieces = engine.feed([(cut, LONG[begin:end])])
    for token in LONG[:300]:
        tokens = engine.feed([(single, [token])])
    step = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}[kv]
    tolerance = 2e-5 + step * float(at_once.abs().max()) / 8
    torch.testing.assert_close(pieces, at_once, rtol=0, atol=tolerance)
    torch.testing.assert_close(tokens, at_once, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_codes_of_a_prefix_are_shared_and_reopened(long_folder: Path, kv: str) -> None:
    engine = opened(long_folder, kv=kv)
    one = engine.open()
    engine.feed([(one, LONG[:300])])
    held = engine.nbytes()
    other = engine.fork(one, 256)
    assert engine.nbytes() == held
    inside = engine.fork(one, 100)  # a block of codes that is written to again
    exact = opened(long_folder)
    for sequence, length in ((other, 256), (inside, 100)):
        logits = engine.feed([(sequence, LONG[300:350])])
        expected = exact.feed([(exact.open(), LONG[:length] + LONG[300:350])])
        tolerance = {"int8": 0.02, "int4": 0.2}[kv] * float(expected.abs().max())
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    before = engine.nbytes()
    for sequence in (one, other, inside):
        engine.close(sequence)
    assert before > 0 and engine.nbytes() == 0


def test_memory_follows_what_is_used(long_folder: Path) -> None:
    sizes = {}
    for kv in ("float32", "float16", "int8", "int4"):
        engine = opened(long_folder, kv=kv)
        assert engine.nbytes() == 0
        engine.feed([(engine.open(), LONG[:385])])
        sizes[kv] = engine.nbytes()
    blocks, heads, width = 7, 2 * 2, 24 + 32  # keys of 24, values of 24 padded to 32
    assert sizes["float32"] == blocks * heads * 64 * width * 4 == 2 * sizes["float16"]
    exact = 3 * heads * 64 * width * 2  # the first block, the one before the last, and the last
    assert sizes["int8"] == exact + 4 * heads * 64 * (width + 4)
    assert sizes["int4"] == exact + 4 * heads * 64 * (width // 2 + 4)


def test_refusals(tiny_family: Callable[[str], Path]) -> None:
    engine = opened(tiny_family("llama"), sequences=1, context=8)
    one = engine.open()
    with pytest.raises(UnsupportedError, match="one more sequence"):
        engine.open()
    for parts, what in (
        ([(one, [])], "no tokens"),
        ([(one, [engine.vocab_size])], "ids below"),
        ([(one, [1] * 9)], "exceed the context"),
        ([(one, [1]), (one, [2])], "twice"),
        ([(one + 1, [1])], "not open"),
    ):
        with pytest.raises(InputError, match=what):
            engine.feed(parts)
    assert engine.length(one) == 0 and engine.nbytes() == 0


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_other_families_fall_back(tiny_family: Callable[[str], Path], family: str) -> None:
    engine = open_engine(tiny_family(family))
    assert engine.name == "transformers" and engine.why is not None and "does not know this family" in engine.why
    assert engine.feed([(engine.open(), TOKENS[:3])]).shape == (1, engine.vocab_size)


def test_a_part_of_each_head_turned_is_left_to_transformers(tiny_family: Callable[[str], Path]) -> None:
    """Whose class for Llama turns whole heads all the same."""
    folder = tiny_family("llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    engine = open_engine(folder)
    assert engine.name == "transformers" and engine.why is not None and "a part of each head" in engine.why


def test_older_names_of_arrays(tiny_family: Callable[[str], Path]) -> None:
    """As the model without its head had them: transformers knows them, so they are read by it."""
    folder = tiny_family("llama-tied")
    expected = every_logit(folder, TOKENS)
    held = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): held[name] for name in held}, folder / "model.safetensors", {"format": "pt"}
    )
    torch.testing.assert_close(opened(folder).every_logit(TOKENS), expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_head_that_is_not_there(tiny_family: Callable[[str], Path], family: str) -> None:
    """It is no copy of the embedding unless the configuration, or a default of the class, says so."""
    folder = tiny_family(family)
    held = load_file(folder / "model.safetensors")
    held.pop("lm_head.weight", None)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    found = {}
    for stated in (None, False, True):
        told = config | {"tie_word_embeddings": stated}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
        try:
            found[stated] = opened(folder).every_logit(TOKENS)
        except CorruptFileError as error:
            assert "lm_head.weight" in str(error)
    assert list(found) == ([True] if family == "llama" else [None, True])
    torch.testing.assert_close(found[True], every_logit(folder, TOKENS), **CLOSE)


def test_what_others_quantized_is_left_to_transformers(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quantized by gptq"):
        NativeEngine.load(folder, None, "float16", 1, None, None)


def test_arrays_that_contradict_the_configuration(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 16}))
    with pytest.raises(UnsupportedError, match="other shapes"):
        NativeEngine.load(folder, None, "float16", 1, None, None)


def test_rows_lie_where_those_of_the_call_before_did(tiny_family: Callable[[str], Path]) -> None:
    engine = opened(tiny_family("llama"))
    one, other = engine.open(), engine.open()
    expected = engine.feed([(one, TOKENS[:9]), (other, TOKENS[3:5])])
    for sequence in (one, other):
        engine.keep(sequence, 0)
    rows = engine.feed_rows([(one, TOKENS[:9]), (other, TOKENS[3:5])])
    assert [row.tolist() for row in rows] == expected.tolist()
    rows[0][0] = 5e5  # a draw overwrites them
    again = engine.feed_rows([(one, TOKENS[9:10])])
    assert again[0].obj is rows[0].obj and again[0][0] != 5e5
    assert expected[0, 0] != 5e5  # what feed() gave stays
