# SPDX-License-Identifier: Apache-2.0
"""The whole evaluation on tiny random models: figures, protocol, refusals, and what it must leave alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.errors import InputError, SpecError
from fewbit.evaluation import evaluate
from fewbit.measure import energy, memory, size, tokens

WORDS = ["the", "cat", "sat", "on", "mat", "and", "then", "it", "ran", "to", "see", "who", "was", "at", "old", "red"]


def build(seed: int, vocabulary: int = 64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float().eval()
    torch.random.set_rng_state(state)
    return model


def save(model: Any, folder: Path, bos: bool = False) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        word: 3 + i for i, word in enumerate(dict.fromkeys([*WORDS, "a"]))
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a reference whose weights differ a little."""
    where = tmp_path_factory.mktemp("models")
    reference, model = build(0), build(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape)))
    return save(model, where / "model"), save(reference, where / "original")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[(7 * i + i * i) % len(WORDS)] for i in range(200)))
    return path


def ids_of(number: int) -> torch.Tensor:
    return torch.randint(3, 64, (number,), generator=torch.Generator().manual_seed(1))


def test_figures_equal_a_float64_loop_over_the_models() -> None:
    model, reference, ids = build(1), build(2), ids_of(100)
    found = evaluate(model, reference, text=ids, context=32, decode_tokens=0)
    nll, kl, agree = [], [], []
    for start in range(0, 96, 32):
        window = ids[start : start + 32]
        with torch.no_grad():
            q, p = (m.double()(window[None]).logits[0].log_softmax(-1) for m in (model, reference))
        nll += [-float(q[t, window[t + 1]]) for t in range(31)]
        kl += [float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(31)]
        agree += [int(q[t].argmax() == p[t].argmax()) for t in range(31)]
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / 93), rel=1e-5)
    assert found.kl_mean == pytest.approx(sum(kl) / 93, rel=1e-4)
    assert found.top1_agreement == pytest.approx(sum(agree) / 93)
    assert found.protocol["tokens_scored"] == 93 and found.protocol["windows"] == 3


def test_a_model_beside_itself_is_at_distance_zero() -> None:
    model = build(3)
    found = evaluate(model, model, text=ids_of(64), context=16, decode_tokens=0)
    assert (found.kl_mean, found.kl_p999, found.top1_agreement, found.perplexity_ratio) == (0, 0, 1, 1)


def test_unscored_tokens_are_left_out() -> None:
    model, ids = build(4), ids_of(64)
    found = evaluate(model, model, text=ids, context=32, unscored=16, decode_tokens=0)
    with torch.no_grad():
        parts = [model(ids[None, s : s + 32]).logits[0, 15:31].log_softmax(-1) for s in (0, 32)]
    nll = torch.cat([-part.gather(1, ids[s + 16 : s + 32, None]) for part, s in zip(parts, (0, 32), strict=True)])
    assert found.protocol["tokens_scored"] == 32
    assert found.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-5)


def test_a_model_in_memory_is_timed_in_this_process_and_says_so() -> None:
    """Folders are in processes of their own: ``test_eval_measures_and_writes`` of ``tests/commands``."""
    stages: list[str] = []
    found = evaluate(build(5), text=ids_of(64), context=32, decode_tokens=3, progress=lambda s, d, t: stages.append(s))
    assert {"load", "score", "time"} == set(stages)
    assert found.decode_tokens_per_s is not None and found.decode_tokens_per_s > 0
    assert found.linear_share is not None and 0 < found.linear_share < 1
    assert any("this process" in note for note in found.protocol["notes"])


def test_without_a_reference_kl_is_none_and_the_reason_is_there() -> None:
    found = evaluate(build(5), text=ids_of(64), context=32, decode_tokens=0)
    assert found.kl_mean is None and found.reference is None and found.to_json()["top1_agreement"] is None
    assert any("no reference" in note for note in found.protocol["notes"])


def test_random_state_threads_and_mode_are_untouched() -> None:
    model = build(6).train()
    model.register_forward_pre_hook(lambda module, inputs: torch.rand(1) and None)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    evaluate(model, text=ids_of(64), context=32, decode_tokens=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads and model.training and torch.is_grad_enabled()


def test_a_result_does_not_change_between_runs(folders: tuple[Path, Path], text: Path) -> None:
    first, second = (evaluate(*folders, text, context=32, decode_tokens=0).to_json() for _ in range(2))
    for value in (first, second):
        value["environment"].pop("time")
    assert first == second


def test_the_context_is_cut_to_the_model_and_to_the_text(folders: tuple[Path, Path], text: Path) -> None:
    long = evaluate(*folders, text, context=2048, decode_tokens=0)
    assert long.protocol["context"] == 48 and any("cut from 2048" in note for note in long.protocol["notes"])
    short = evaluate(build(7), text=ids_of(10), context=32, decode_tokens=0)
    assert short.protocol["context"] == 10 and any("windows of 10" in note for note in short.protocol["notes"])
    assert "one window only" in short.protocol["stderr"]


def test_max_tokens_bounds_the_text(folders: tuple[Path, Path], text: Path) -> None:
    assert evaluate(*folders, text, context=32, max_tokens=70, decode_tokens=0).protocol["windows"] == 2
    assert evaluate(*folders, text, context=32, max_tokens=20, decode_tokens=0).protocol["context"] == 20


def test_windows_start_with_bos_where_the_tokenizer_adds_one(tmp_path: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    plain, marked = (AutoTokenizer.from_pretrained(save(build(8), tmp_path / str(b), bos=b)) for b in (False, True))
    with_bos, without = (tokens.cut(t, text, 16, None, 1) for t in (marked, plain))
    assert with_bos.bos and bool((with_bos.ids[:, 0] == 1).all()) and not without.bos
    assert torch.equal(with_bos.ids[:, 1:].reshape(-1)[:150], without.ids.reshape(-1)[:150]), "no text token is lost"


def test_refusals(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, original = folders
    with pytest.raises(InputError, match="no such folder"):
        evaluate(tmp_path / "absent", original)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(InputError, match="no text"):
        evaluate(model, original, empty, decode_tokens=0)
    one = tmp_path / "one.txt"
    one.write_text("cat")
    with pytest.raises(InputError, match="longer text"):
        evaluate(model, original, one, decode_tokens=0)
    with pytest.raises(InputError, match="vocabularies"):
        evaluate(build(1), build(1, vocabulary=80), text=ids_of(64), context=32, decode_tokens=0)
    with pytest.raises(InputError, match="tokenizer"):
        evaluate(build(1), decode_tokens=0)
    for wrong in ({"context": 1}, {"unscored": 0}, {"decode_tokens": -1}):
        with pytest.raises(SpecError, match="out of range"):
            evaluate(build(1), text=ids_of(64), **wrong)
    with pytest.raises(SpecError, match="48 positions"):
        evaluate(build(1), text=ids_of(64), decode_tokens=64)


def test_another_tokenizer_is_refused(folders: tuple[Path, Path], tmp_path: Path, text: Path) -> None:
    from tokenizers import Tokenizer

    other = save(build(0), tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["the"], words["and"] = words["and"], words["the"]
    Tokenizer.from_str(json.dumps(content)).save(str(other / "tokenizer.json"))
    with pytest.raises(InputError, match="different ids"):
        evaluate(folders[0], other, text, decode_tokens=0)


def test_a_broken_child_process_says_why(folders: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    from fewbit.measure.worker import Child, Job

    with pytest.raises(InputError, match=r"config\.json"):
        Child(Job(str(tmp_path), "float32", [1, 2, 3], 2, 1))


def test_peak_memory_is_not_inherited_from_a_large_parent() -> None:
    """``ru_maxrss`` is: a child of this process (torch is loaded) would report hundreds of megabytes."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    source = Path(memory.__file__).read_text()
    code = f"{source}\nprint(peak_rss_bytes())"
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert memory.peak_rss_bytes() > 150e6 > 60e6 > int(out) > 2e6


def test_size_counts_every_shard_and_matrices_only(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(8, 16, dtype=torch.bfloat16), "n": torch.zeros(5)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(8, 16, dtype=torch.float32)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "n": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = size.of_path(tmp_path, 261)
    assert found.size_bytes == sum((tmp_path / f"{n}.safetensors").stat().st_size for n in ("one", "two"))
    assert found.bits_per_weight == 24
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"two\.safetensors"):
        size.of_path(tmp_path, 261)


def test_bits_of_a_gguf_file_are_those_of_its_blocks(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    blocks = gguf.quantize(np.zeros((4, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert size.of_path(tmp_path / "m.gguf", 1).bits_per_weight == 4.5


def powercap(folder: Path, name: str, energy_uj: int) -> Path:
    domain = folder / name
    domain.mkdir()
    (domain / "energy_uj").write_text(f"{energy_uj}\n")
    (domain / "max_energy_range_uj").write_text("1000000\n")
    return domain


def test_energy_counters_wrap_and_subdomains_do_not_count_twice(tmp_path: Path) -> None:
    package = powercap(tmp_path, "intel-rapl:0", 900_000)
    part = powercap(tmp_path, "intel-rapl:0:0", 5)
    meter = energy.meter("cpu", tmp_path)
    before = meter.read()
    (package / "energy_uj").write_text("300000")
    (part / "energy_uj").write_text("250005")
    assert meter.source == "RAPL" and meter.joules(before, meter.read()) == pytest.approx(0.4)


def test_energy_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert "is missing" in energy.meter("cpu", tmp_path / "absent").unavailable
    assert "no RAPL package" in energy.meter("cpu", tmp_path).unavailable
    domain = powercap(tmp_path, "intel-rapl:0", 1)
    (domain / "energy_uj").write_text("garbage")
    assert energy.meter("cpu", tmp_path).unavailable.startswith("not measurable here")
