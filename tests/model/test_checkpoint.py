# SPDX-License-Identifier: Apache-2.0
"""What cannot be used is refused with its reason before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make
from transformers import AutoConfig

from fewbit.decode import open_engine
from fewbit.errors import CorruptFileError, InputError, UnsupportedError
from fewbit.model import checkpoint as C
from fewbit.model.classes import from_folder
from fewbit.model.stream import StreamedModel


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace or drop (None) tensors of the single weight file."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, file, {"format": "pt"})


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    model = make("llama", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one, many = C.open_checkpoint(tmp_path / "one"), C.open_checkpoint(tmp_path / "many")
    assert len(many.files) > 2
    assert sorted(one.keys()) == sorted(many.keys())
    assert one.nbytes == many.nbytes == sum(value.nbytes for value in model.state_dict().values())
    for key in list(one.keys()):
        assert torch.equal(one.get(key), many.get(key))
        assert one.shape(key) == many.shape(key) == tuple(one.get(key).shape)
    assert one.architecture == "LlamaForCausalLM"
    state = hashlib.sha256()
    for path in many.files:
        state.update(path.read_bytes())
    assert many.fingerprint() == state.hexdigest() != one.fingerprint()
    with pytest.raises(InputError, match="none of that name"):
        one.get("model.nothing")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make("llama", tmp_path / "one").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-0000*"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        C.open_checkpoint(tmp_path)


def test_an_index_that_contradicts_its_files_is_refused(tmp_path: Path) -> None:
    make("llama", tmp_path / "one").save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    key = "model.norm.weight"

    def refused(change: dict[str, str | None], words: str) -> None:
        places = {k: v for k, v in {**index["weight_map"], **change}.items() if v is not None}
        path.write_text(json.dumps({**index, "weight_map": places}))
        with pytest.raises(CorruptFileError, match=words):
            C.open_checkpoint(tmp_path)

    refused({"model.extra": files[0]}, "no file holds")
    refused({key: None}, "does not name")
    refused({key: next(name for name in files if name != index["weight_map"][key])}, "which its index puts in")
    for name in ("../one/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "a\0b", ""):
        refused({key: name}, "leaves the folder")
    path.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(CorruptFileError, match="weight_map"):
        C.open_checkpoint(tmp_path)


def test_links_out_of_the_folder_are_refused_but_the_hub_cache_works(tmp_path: Path) -> None:
    make("llama", tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in (tmp_path / "real").iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(CorruptFileError, match="outside the folder"):
        C.open_checkpoint(linked)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((tmp_path / "real").iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / str(number))
    assert C.open_checkpoint(snapshot).keys()


def test_missing_tensors_wrong_shapes_and_short_checkpoints_are_named(tmp_path: Path) -> None:
    make("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    good = load_file(tmp_path / "model.safetensors")[name]
    rewrite(tmp_path, {name: None})
    with pytest.raises(InputError, match=name):
        StreamedModel.open(C.open_checkpoint(tmp_path))
    rewrite(tmp_path, {name: good.T.contiguous()})
    with pytest.raises(InputError, match=r"\(32, 48\).*\(48, 32\)"):
        StreamedModel.open(C.open_checkpoint(tmp_path))


def test_tensors_without_a_place_are_listed_but_for_buffers_of_old_versions(tmp_path: Path) -> None:
    make("llama", tmp_path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.2.norm": torch.ones(4)}
    rewrite(tmp_path, more)
    assert StreamedModel.open(C.open_checkpoint(tmp_path)).unused == ["model.layers.2.norm"]


def test_integers_in_place_of_floats_are_refused(tmp_path: Path) -> None:
    make("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, {name: torch.ones(48, 32, dtype=torch.int8)})
    with pytest.raises(UnsupportedError, match=f"{name} holds integers"):
        StreamedModel.open(C.open_checkpoint(tmp_path))


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_what_others_quantized_is_no_float_weight(tmp_path: Path, kind: torch.dtype) -> None:
    """Read without their scales, such weights were another model, in silence: folders of which config.json says
    nothing, as some tools keep that in a file beside."""
    make("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, {name: torch.ones(48, 32).to(kind), f"{name}_scale": torch.ones(48, 1)})
    for reads in (C.open_checkpoint, from_folder, open_engine):
        with pytest.raises(UnsupportedError, match=f"{name} holds"):
            reads(tmp_path)
    if kind == torch.float8_e4m3fn:  # a plain cast, with nothing that scales it, is what it is
        rewrite(tmp_path, {f"{name}_scale": None})
        assert from_folder(tmp_path).get_parameter(name).mean() == 1
    rewrite(
        tmp_path, {name: torch.ones(48, 32), "model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4).to(torch.uint8)}
    )
    assert C.open_checkpoint(tmp_path).keys()  # a causal mask, which older checkpoints hold
    config = json.loads((tmp_path / "config.json").read_text())
    config["compression_config"] = {"quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="already, by compressed-tensors"):
        C.open_checkpoint(tmp_path)


@pytest.mark.parametrize("which", ["layers.1.*.experts.3.*w1", "layers.1.*.experts.3"])
def test_a_missing_expert_is_noticed_at_once(which: str, tmp_path: Path) -> None:
    make("mixtral", tmp_path)
    keys = [key for key in load_file(tmp_path / "model.safetensors") if re.search(which, key)]
    rewrite(tmp_path, dict.fromkeys(keys))
    with pytest.raises(InputError, match=r"layers\.1.*experts"):
        StreamedModel.open(C.open_checkpoint(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(value: float, tmp_path: Path) -> None:
    make("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    bad = load_file(tmp_path / "model.safetensors")[name]
    bad[3, 4] = bad[5, 6] = value
    rewrite(tmp_path, {name: bad})
    model = StreamedModel.open(C.open_checkpoint(tmp_path))
    model.load("model.layers.0")
    with pytest.raises(InputError, match=rf"{name}.*(2 NaN and 0 inf|0 NaN and 2 inf)"):
        model.load("model.layers.1")


def test_finite_weights_whose_sum_overflows_are_finite() -> None:
    C.check_finite("w", torch.full((8, 8), 3e38))
    C.check_finite("w", torch.full((300,), 6e4, dtype=torch.float16))
    C.check_finite("w", torch.zeros(0))
    C.check_finite("w", torch.tensor([1, 2]))


@pytest.mark.parametrize("count", [10**9, 3])
def test_more_layers_than_weights_are_refused_before_the_skeleton_is_built(count: int, tmp_path: Path) -> None:
    make("llama", tmp_path)
    edit(tmp_path, num_hidden_layers=count)
    with pytest.raises(InputError, match=rf"{count} layers, its weights 2"):
        C.open_checkpoint(tmp_path)


def test_a_configuration_with_huge_sizes_allocates_nothing(tmp_path: Path) -> None:
    make("llama", tmp_path)
    edit(tmp_path, vocab_size=10**12, hidden_size=10**6, intermediate_size=10**9)
    with pytest.raises(InputError):
        StreamedModel.open(C.open_checkpoint(tmp_path))


def test_unusable_configurations_are_refused_with_their_reason(tmp_path: Path) -> None:
    make("llama", tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    for content, kind, words in (
        ("{", CorruptFileError, "JSON"),
        ("[]", CorruptFileError, "list"),
        ('{"a": 1, "a": 2}', CorruptFileError, "twice"),
        ("[" * 100_000, CorruptFileError, "JSON"),
        ("{}", InputError, "model_type"),
        ('{"model_type": "no-such-model"}', UnsupportedError, "no-such-model"),
        (json.dumps({**json.loads(text), "quantization_config": {"quant_method": "gptq"}}), UnsupportedError, "gptq"),
        (json.dumps({**json.loads(text), "hidden_size": "many"}), InputError, "hidden_size"),
    ):
        config.write_text(content)
        with pytest.raises(kind, match=words):
            C.open_checkpoint(tmp_path)
    config.unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        C.open_checkpoint(tmp_path)


def test_a_model_type_that_is_no_language_model_is_named(tmp_path: Path) -> None:
    make("llama", tmp_path)
    config = AutoConfig.for_model("vit", num_hidden_layers=2)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    with pytest.raises(UnsupportedError, match="vit"):
        StreamedModel.open(C.open_checkpoint(tmp_path))


def test_code_in_a_model_folder_is_never_run(tmp_path: Path) -> None:
    make("llama", tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    edit(tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UnsupportedError, match="never run"):
        C.open_checkpoint(tmp_path)
    edit(tmp_path, model_type="llama")
    StreamedModel.open(C.open_checkpoint(tmp_path))
    assert not marker.exists()


def test_pickle_is_refused_and_the_way_out_is_said(tmp_path: Path) -> None:
    make("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"pickle.*safe_serialization"):
        C.open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights.gguf")
    with pytest.raises(InputError, match=r"name the file.*weights\.gguf"):
        C.open_checkpoint(tmp_path)


def test_only_a_hub_id_reaches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str) -> Path:
        asked.append(name)
        raise InputError("offline")

    monkeypatch.setattr(C, "download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in (
        "llama",
        "./llama",
        "../a/b",
        "/no/such",
        "models/llama",
        "a/b/c",
        "~/x",
        "a b/c",
        "",
        "\0",
        "x" * 5000,
    ):
        with pytest.raises(InputError):
            C.open_checkpoint(name)
    with pytest.raises(InputError):
        C.open_checkpoint(Path("owner/model"))
    assert asked == []
    with pytest.raises(InputError, match="offline"):
        C.open_checkpoint("owner/model")
    assert asked == ["owner/model"]


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"no \.gguf"):
        C.open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"no config\.json"):
        C.open_checkpoint(tmp_path)


def test_tokenizers_missing_or_broken_are_said(tmp_path: Path) -> None:
    make("llama", tmp_path)
    with pytest.raises(InputError, match="the folder has none"):
        C.open_checkpoint(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").write_text('{"model": 7')
    with pytest.raises(InputError, match="tokenizer"):
        C.open_checkpoint(tmp_path).tokenizer()


def test_sidecars_are_copied_without_a_quantization_config(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make("llama", source)
    (source / "tokenizer.json").write_text('{"a": "\u00e9"}', encoding="utf-8")
    (source / "evil.py").write_text("")
    out.mkdir()
    written = C.open_checkpoint(source).save_sidecars(out)
    assert written.keys() == {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json",
    }  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name, digest in written.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
