# SPDX-License-Identifier: Apache-2.0
"""Every command on a real, tiny model, through the command line as scripts call it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

import fewbit
from fewbit.commands import bench
from fewbit.commands import demo as demo_command
from fewbit.doctor import EXTRAS
from fewbit.kernels import native
from fewbit.measure import size

Command = Callable[..., Result]
PLAN_KEYS = {"size_bytes", "bits_per_weight", "peak_rss_bytes", "seconds", "layers"}
LAYER_KEYS = {"name", "format", "method", "kernel", "reason_skipped"}
EVAL_KEYS = {
    "perplexity",
    "perplexity_stderr",
    "kl_mean",
    "kl_p999",
    "top1_agreement",
    "bits_per_weight",
    "size_bytes",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
}


def loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_quantize_leaves_a_whole_folder(quantized: Path) -> None:
    described = loaded(quantized / "fewbit.json")
    assert {layer["method"] for layer in described["layers"] if layer["kind"] == "linear"} == {"gptq"}
    assert (quantized / "tokenizer.json").is_file()
    assert not quantized.with_name("out.partial").exists()


def test_quantize_shows_layers_on_stderr_and_the_result_on_stdout(tiny: Path, command: Command, tmp_path: Path) -> None:
    result = command("quantize", tiny, "-f", "int8/g32", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "model.layers.1.mlp.down_proj" in result.stderr
    assert "bits" in result.stderr and "peak" in result.stderr
    assert "true bits per weight" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


def test_quantize_refuses_to_overwrite(quantized: Path, tiny: Path, command: Command) -> None:
    before = (quantized / "fewbit.json").read_bytes()
    result = command("quantize", tiny, "-f", "int8/g32", "-o", quantized)
    assert result.exit_code == 3
    assert "exists already" in result.stderr and "--force" in result.stderr
    assert (quantized / "fewbit.json").read_bytes() == before


def test_quantize_json_to_stdout_is_clean(tiny: Path, command: Command, tmp_path: Path) -> None:
    result = command("quantize", tiny, "-f", "int8/g32", "-o", tmp_path / "out", "--json", "-")
    assert json.loads(result.stdout)["bits_per_weight"] > 8


def test_recipe_file(tiny: Path, command: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*.mlp.*"\nformat = "int4/g32"\n[[rule]]\nmatch = "*"\nformat = "float"\n')
    result = command("plan", tiny, "--recipe", recipe, "--json", "-")
    assert result.exit_code == 0, result.stderr
    formats = {layer["name"]: layer["format"] for layer in json.loads(result.stdout)["layers"]}
    assert formats["model.layers.0.mlp.up_proj"] == "int4/g32"
    assert formats["model.layers.0.self_attn.q_proj"] == "float"


def test_a_recipe_goes_before_the_format(tiny: Path, command: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*.down_proj"\nformat = "int8/g32"\n')
    result = command("plan", tiny, "--recipe", recipe, "--format", "int4/g32", "--json", "-")
    formats = {layer["name"]: layer["format"] for layer in json.loads(result.stdout)["layers"]}
    assert formats["model.layers.0.mlp.down_proj"] == "int8/g32"
    assert formats["model.layers.0.mlp.up_proj"] == "int4/g32"
    assert formats["model.embed_tokens"] == "int8/g64"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "--format"),
        (("--recipe", "x.toml", "--option", "steps=3"), 3, "x.toml"),
        (("-f", "int9/g32"), 2, "int9/g32"),
        (("-f", "int4/g32", "-m", "magic"), 2, "magic"),
        (("-f", "int4/g32", "-m", "gptq", "--option", "damp"), 2, "NAME=VALUE"),
        (("-f", "int4/g32", "-m", "gptq", "--option", "colour=1"), 2, "colour"),
        (("-f", "int2/g32"), 2, "--force"),
        (("-f", "int4/g32", "--transform", "magic"), 2, "magic"),
        (("-f", "int4/g32", "--transform", "rotate", "--transform", "smooth"), 2, "put smooth first"),
        (("--recipe", "x.toml", "--transform", "smooth"), 3, "x.toml"),
        (("--recipe", "/nonexistent/recipe.toml"), 3, "recipe.toml"),
    ],
)
def test_refusals_come_before_work(
    tiny: Path, command: Command, arguments: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    result = command("quantize", tiny, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_transforms_are_named_in_plan_result_and_inspection(tiny: Path, command: Command, tmp_path: Path) -> None:
    asked = ("-f", "W8A8", "--transform", "smooth", "--transform", "rotate", "--samples", "4", "--context", "64")
    planned = command("plan", tiny, *asked, "--json", tmp_path / "plan.json")
    assert "smooth + rotate + rtn" in " ".join(planned.stdout.split()), planned.stderr
    done = command("quantize", tiny, *asked, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    inspected = command("inspect", tmp_path / "out", "--json", tmp_path / "found.json")
    layer = next(x for x in loaded(tmp_path / "found.json")["layers"] if x["name"].endswith("0.mlp.up_proj"))
    assert layer["transforms"] == ["smooth", "rotate"] and [r["kind"] for r in layer["rewrites"]] == [
        "scale",
        "rotation",
    ]
    compared = command("compare", tmp_path / "out", "--json", "-")
    assert json.loads(compared.stdout)["rows"][0]["method"] == "smooth + rotate + rtn"
    assert "smooth + rotate + rtn" in (tmp_path / "out" / "report.html").read_text()
    assert inspected.exit_code == 0
    shown = " ".join(inspected.stdout.split())
    assert layer["activation"] == "int8/channel/sym" and layer["kernel"] in shown and "inputs" in shown


def test_a_recipe_names_its_own_transforms(tiny: Path, command: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*"\nformat = "int4/g32"\ntransforms = ["rotate"]\n')
    result = command("plan", tiny, "--recipe", recipe, "--json", "-")
    layers = {layer["name"]: layer["transforms"] for layer in json.loads(result.stdout)["layers"]}
    assert layers["model.layers.0.mlp.up_proj"] == ["rotate"]
    refused = command("plan", tiny, "--recipe", recipe, "--transform", "smooth")
    assert refused.exit_code == 2 and "--transform without --format" in refused.stderr


def test_missing_model(command: Command, tmp_path: Path) -> None:
    result = command("plan", tmp_path / "nothing", "-f", "int4/g32")
    assert result.exit_code == 3
    assert "nothing" in result.stderr


def test_plan_keys_and_exact_size(quantized: Path, tiny: Path, command: Command, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    result = command("plan", tiny, "--format", "int4/g32/asym", "--method", "gptq", "--json", target)
    assert result.exit_code == 0, result.stderr
    planned, described = loaded(target), loaded(quantized / "fewbit.json")
    assert set(planned) >= PLAN_KEYS
    assert all(set(layer) >= LAYER_KEYS for layer in planned["layers"])
    assert planned["bits_per_weight"] == pytest.approx(described["bits_per_weight"], rel=1e-12)
    tensors = loaded(quantized / "model.safetensors.index.json")["metadata"]["total_size"]
    assert planned["size_bytes"] == tensors <= described["size_bytes"]
    assert "model.layers.0.mlp.up_proj" in result.stdout


def test_eval_measures_and_writes(quantized: Path, tiny: Path, command: Command, tmp_path: Path) -> None:
    """Both models, each in a process of its own."""
    target = tmp_path / "eval.json"
    result = command("eval", quantized, "--context", 64, "--max-tokens", 256, "--decode-tokens", 2, "--json", target)
    assert result.exit_code == 0, result.stderr
    measured = loaded(target)
    assert set(measured["reference"]) == set(measured) - {"reference", "protocol", "environment"}
    assert measured["kl_mean"] > 0 and measured["perplexity"] > 1
    for figures in (measured, measured["reference"]):
        assert all(math.isfinite(figures[key]) for key in EVAL_KEYS)
        assert 0 < figures["linear_share"] < 1 and figures["peak_rss_bytes"] > 50e6
        assert figures["decode_tokens_per_s"] > 0 and len(figures["runs"]["decode_tokens_per_s"]) == 3
        energy = figures["energy_joules_per_token"]
        assert isinstance(energy, float) or "not measurable here" in energy
    assert measured["reference"]["bits_per_weight"] == 32
    assert measured["reference"]["size_bytes"] == (tiny / "model.safetensors").stat().st_size
    notes = " ".join(measured["protocol"]["notes"])
    assert not any(str(path.parent) in notes for path in (quantized, tiny)), "notes are published: no local paths"
    assert loaded(quantized / "evaluation.json") == measured
    assert "perplexity" in result.stdout
    assert measured["protocol"]["engine"] in result.stderr and "native runtime" in result.stderr
    assert "<html" in (quantized / "report.html").read_text(encoding="utf-8")
    assert (quantized / "README.md").is_file()


def test_compare(quantized: Path, command: Command) -> None:
    result = command("compare", quantized, quantized, "--json", "-")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == 2
    assert rows[0]["format"] == "int4/g32/asym" and rows[0]["method"] == "gptq"


def test_a_report_of_what_nobody_measured_is_refused(quantized: Path, command: Command, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(quantized, bare)
    (bare / "evaluation.json").unlink(missing_ok=True)
    result = command("compare", bare, bare, "--report", tmp_path / "report.html")
    assert result.exit_code == 3 and "fewbit eval" in result.stderr, result.stderr
    assert not (tmp_path / "report.html").exists()


def test_bench_keys(quantized: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, least in (("SLICE", 0.001), ("COPIES", 2)):  # keys and ratios, not figures that hold
        monkeypatch.setattr(bench, name, least)
    result = command("bench", quantized, "--tokens", 4, "--prompt-tokens", 1 << 20, "--batch", 1, "--json", "-")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert 0 < found["prompt_tokens"] < 1 << 20 and f"a prompt of {found['prompt_tokens']} tokens" in result.stderr
    assert found["prefill_tokens_per_s"] > 0 and found["decode_tokens_per_s"] > 0
    assert found["engine"] == ("native" if native.available() else "transformers")
    row = found["kernels"][0]
    assert row["seconds"] > 0
    assert row["times_fp32"] == pytest.approx(row["fp32_seconds"] / row["seconds"])


def test_generate_streams_the_prompt_and_more(quantized: Path, command: Command) -> None:
    result = command("generate", quantized, "--prompt", "abc", "--max-tokens", 5)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("abc")
    assert "tokens/s" in result.stderr
    again = command("generate", quantized, "--prompt", "abc", "--max-tokens", 5)
    assert again.stdout == result.stdout


def test_generate_keeps_an_image_says_so_and_starts_from_it(quantized: Path, command: Command, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy, ignore=shutil.ignore_patterns(".fewbit"))
    run = ("generate", copy, "--prompt", "abc", "--max-tokens", 5)
    without = command(*run, "--no-image")
    assert without.exit_code == 0 and not (copy / ".fewbit").exists() and "kept" not in without.stderr
    first, second = command(*run), command(*run)
    (image,) = (copy / ".fewbit").iterdir()
    assert str(image) in first.stderr and "kB" in first.stderr and str(image) not in second.stderr
    assert without.stdout == first.stdout == second.stdout
    image.write_bytes(image.read_bytes()[:-1])
    third = command(*run)
    assert "cut off" in third.stderr and f"{image} (" in third.stderr and third.stdout == first.stdout
    shutil.rmtree(copy / ".fewbit")
    (copy / ".fewbit").touch()
    refused = command(*run)
    assert refused.exit_code == 0 and "every start repacks" in refused.stderr and refused.stdout == first.stdout


def test_generate_draws_by_seed_and_stops_where_it_is_told(quantized: Path, command: Command) -> None:
    def text(*options: object) -> str:
        result = command("generate", quantized, "--prompt", "abc", "--max-tokens", 12, *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout.removeprefix("abc").removesuffix("\n")

    drawn = [text("--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    greedy = text()
    assert text("--temperature", 1.5, "--top-k", 1) == greedy
    stop = greedy[len(greedy) // 2 :][:2]
    assert text("--stop", stop) == greedy[: greedy.index(stop)]
    sampling = fewbit.Sampling(temperature=0.0, max_tokens=12)
    assert fewbit.generate(quantized, "abc", sampling) == greedy


def test_generate_says_what_is_wrong(quantized: Path, command: Command) -> None:
    for options, what in ((("--top-p", 2), "top_p"), (("--kv", "int3"), "int3"), (("--chat",), "chat template")):
        result = command("generate", quantized, "--prompt", "abc", *options)
        assert result.exit_code != 0 and what in result.stderr and "Traceback" not in result.stderr


def test_generate_without_a_tokenizer(quantized: Path, command: Command, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    (copy / "tokenizer.json").unlink()
    result = command("generate", copy, "--prompt", "abc")
    assert result.exit_code == 3
    assert "tokenizer" in result.stderr


def test_inspect_verifies_hashes(quantized: Path, command: Command, tmp_path: Path) -> None:
    found = json.loads(command("inspect", quantized, "--json", "-").stdout)
    assert found["kind"] == "fewbit folder" and "verified" in found["hashes"]
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = command("inspect", copy)
    assert result.exit_code == 3
    assert shard.name in result.stderr


@pytest.mark.parametrize("asked", [("generate", "--prompt", "abc"), ("eval",), ("eval", "--engine", "transformers")])
def test_a_damaged_folder_is_never_run(
    quantized: Path, command: Command, tmp_path: Path, asked: tuple[str, ...]
) -> None:
    """A bit that flipped, or the shard of another run: the model would be another one."""
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    shard = sorted(copy.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = command(asked[0], copy, *asked[1:])
    assert result.exit_code == 3, result.stderr
    assert f"{shard.name}; its bytes differ" in result.stderr


@pytest.mark.parametrize("image", [False, True])
def test_other_tokens_are_refused_and_edited_settings_named(
    quantized: Path, command: Command, tmp_path: Path, image: bool
) -> None:
    """Another number for a token is another row of the embedding; templates and how to sample are the user's."""
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    asked = ("generate", copy, "--prompt", "abc", "--max-tokens", "2", *["--no-image"] * (not image))
    assert command(*asked).exit_code == 0
    (copy / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert command(*asked).exit_code == 0
    found = json.loads(command("inspect", copy, "--json", "-").stdout)
    assert found["edited"] == ["generation_config.json"]
    assert "generation_config.json" in command("inspect", copy).stdout
    tokens = copy / "tokenizer.json"
    read = json.loads(tokens.read_text())
    vocab = read["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    tokens.write_text(json.dumps(read))
    for words in (asked, ("eval", copy), ("inspect", copy)):
        result = command(*words)
        assert result.exit_code == 3 and "tokenizer.json; its bytes differ" in result.stderr, result.stderr


def test_inspect_other_files(tiny: Path, command: Command, tmp_path: Path) -> None:
    shard = next(tiny.glob("*.safetensors"))
    one = json.loads(command("inspect", shard, "--json", "-").stdout)
    folder = json.loads(command("inspect", tiny, "--json", "-").stdout)
    assert "Hugging Face folder" in command("inspect", tiny).stdout
    assert one["tensors"] == folder["tensors"]
    assert folder["bits_per_weight"] == 32 and folder["architecture"] == "LlamaForCausalLM"
    (tmp_path / "x.bin").write_bytes(b"pickle")
    assert command("inspect", tmp_path / "x.bin").exit_code == 3
    assert command("inspect", tmp_path / "absent.gguf").exit_code == 3


def test_words_that_others_packed_are_not_counted_as_weights(tiny: Path, command: Command, tmp_path: Path) -> None:
    """GPTQ's int32 words are of eight weights each: 32 bits a weight was what inspect and eval said."""
    folder = tmp_path / "gptq"
    folder.mkdir()
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    words = {"x.qweight": torch.zeros(4, 32, dtype=torch.int32), "x.scales": torch.ones(1, 32)}
    save_file(words, folder / "model.safetensors", {"format": "pt"})
    shown, found = command("inspect", folder), json.loads(command("inspect", folder, "--json", "-").stdout)
    assert "quantized by" in shown.stdout and found["quantized_by"] == "gptq"
    assert found["bits_per_weight"] is None and found["parameters"] is None
    assert {t["name"]: t["bits_per_weight"] for t in found["tensors"]} == {"x.qweight": None, "x.scales": 32}
    assert math.isnan(size.of_path(folder, 0).bits_per_weight)
    result = command("plan", folder, "--format", "int4/g32")
    assert result.exit_code == 4 and "quantized already, by gptq" in result.stderr


def test_doctor(command: Command) -> None:
    result = command("doctor", "--json", "-")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["machine"]["cores"] >= 1
    assert found["native"]["available"] or found["native"]["why_not"]
    assert {row["extra"] for row in found["extras"]} == {extra.name for extra in EXTRAS}
    assert all(row["present"] or "pip install" in row["install"] for row in found["extras"])
    assert "instruction sets" in command("doctor").stdout


def test_demo_says_what_to_install_before_any_work(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_command, "PACKAGE", "no_such_wheel")
    result = command("demo", "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert "pip install" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bare_command_and_unknown_command(command: Command) -> None:
    assert "quantize" in command("--help").stdout
    assert command("qantize").exit_code == 2
    assert command("--version").stdout.startswith("fewbit ")
