# SPDX-License-Identifier: Apache-2.0
"""What `from_pretrained` loads computes what the checked folder says, for many families."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fewbit
import fewbit.containers.files
from fewbit import formats, layouts, methods
from fewbit.containers.safetensors import open_safetensors
from fewbit.core.terms import Dense, Sparse, Terms
from fewbit.errors import CorruptFileError, InputError, SpecError, UnsupportedError
from fewbit.kernels import native
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.layers import QuantLinear
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Recipe, Rule
from fewbit.run.verify import read_back, read_rewrite

BOTH = ["smooth", "rotate"]
FAMILIES = ["llama-tied", "gpt2", "gemma2", "gemma3", "phi3", "mixtral", "qwen2-moe", "gpt-oss", "falcon"]


def dequantized_logits(model: Path, out: Path, manifest: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the float model with every layer replaced by what the folder decodes to."""
    streamed = StreamedModel.open(open_checkpoint(model))
    streamed.load("")
    where = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for record in manifest["layers"]:
        path = out / where[f"{record['name']}.weight_packed"]
        decoded = read_rewrite(path, record).unweight(read_back(path, record).dequantize())
        for site in streamed.sites:
            if record["name"] in (site.name, site.tied_to):
                streamed.set_weight(site.name, decoded.reshape(streamed.weight(site.name).shape))
    with torch.no_grad():
        return streamed.module(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_model_equals_its_dequantized_twin(
    family: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, out = tiny_family(family), tmp_path / "out"
    result = fewbit.quantize(model, "int4/g16/asym", method="gptq", out=out, samples=4, context=32, force=True)
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        got = loaded(ids).logits
    expected = dequantized_logits(model, out, result.manifest, ids)
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_model_with_rewrites_equals_its_dequantized_twin(
    family: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = tiny_family(family), tmp_path / "out"
    fused = [Rule("kind:experts", "int4/g16/asym")] if family in ("mixtral", "qwen2-moe", "gpt-oss") else []
    recipe = Recipe((*fused, *Recipe.simple("int4/g16/asym", "gptq", "int8/g16", transforms=BOTH).rules))
    result = fewbit.quantize(model, recipe, out=out, samples=4, context=32, force=True)
    assert sum(len(record["rewrites"]) for record in result.manifest["layers"]) >= 8
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = fewbit.load(out)(ids).logits
    expected = dequantized_logits(model, out, result.manifest, ids)
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_a_cast_does_not_touch_rewrites_and_saving_keeps_them(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    fewbit.quantize(tiny, "W8A8", transforms=BOTH, out=tmp_path / "out", samples=4, context=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.input_0_scale.dtype == torch.float16 and layer.input_1_signs.dtype == torch.uint8
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
    model = fewbit.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    before, after = (
        {name: tensor for path in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in ("out", "again")
    )
    assert before.keys() == after.keys() and sum(".input_0_" in name for name in before) == 14
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("rewrites", [["magic"], "scale", [3]])
def test_rewrites_that_this_version_does_not_know_are_refused(tiny: Path, tmp_path: Path, rewrites: object) -> None:
    fewbit.quantize(tiny, "int4/g32/asym", transforms=["rotate"], out=tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["rewrites"] = rewrites
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match=r"rewrites of model\.layers\.0\.mlp\.up_proj"):
        fewbit.load(tmp_path / "out", check=False)


def test_smoothing_and_rotating_help_where_a_channel_stands_out(tiny: Path, tmp_path: Path) -> None:
    """A norm that makes one channel 300 times larger, and weights that make up for it: the same model, for which 8 bits
    a token leave every other channel less than one step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny)
    for block in model.model.layers:
        for norm, linears in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            norm.weight.data[5] *= 300
            for linear in linears:
                linear.weight.data[:, 5] /= 300
    words = AutoTokenizer.from_pretrained(tiny)
    drift = {
        "+".join(steps): fewbit.quantize(
            model, "W8A8", out=tmp_path / f"out{len(steps)}", tokenizer=words, transforms=steps, samples=4, context=32
        ).manifest["drift"][-1]["relative_error"]
        for steps in ([], ["smooth"], BOTH)
    }
    assert drift["smooth"] < drift[""] / 2 and drift["smooth+rotate"] < drift[""] / 2


def test_an_expert_without_tokens_is_rounded_and_reported(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    one_token = {"samples": 1, "context": 1}  # reaches two of four experts
    out = tmp_path / "out"
    result = fewbit.quantize(tiny_family("mixtral"), "int4/g16/asym", method="gptq", out=out, force=True, **one_token)
    experts = [layer for layer in result.manifest["layers"] if layer["kind"] == "experts"]
    assert len(experts) == 4
    for layer in experts:
        assert layer["note"].startswith("2 of 4 experts saw no calibration token")
        assert "rounded to nearest instead of gptq" in layer["note"]
    assert math.isfinite(result.manifest["check"]["kl_mean"])


def test_an_activation_cast_does_not_touch_scales(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fewbit.quantize(tiny, "int4/g32/asym", out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.qtensor().params["scale"].dtype == torch.float16
    assert model.model.norm.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.arange(8).reshape(1, 8)).logits.dtype == torch.bfloat16


def test_a_loaded_model_may_be_cast_later(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fewbit.quantize(tiny, "int4/g32/asym", out=tmp_path / "out")
    ids = torch.arange(8).reshape(1, 8)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).to(torch.bfloat16)
    with torch.no_grad():
        got, expected = cast(ids).logits, loaded(ids).logits
    assert got.dtype == torch.bfloat16
    # not bit for bit: transformers' own cast rounds the frequencies of positions as well
    assert float((got - expected).abs().max()) <= 0.02 * float(expected.abs().max())


def test_transformers_asks_the_embedding_what_its_weight_is_like(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewbit.quantize(tiny, "int4/g16", method="rtn", out=out)
    model = fewbit.load(out)
    table, size, ids = model.get_input_embeddings(), model.config.vocab_size, torch.arange(5)
    assert table.weight.shape == (size, model.config.hidden_size) and table.weight.dtype == torch.float32
    assert model.resize_token_embeddings(size) is table and model.get_output_embeddings().out_features == size
    with pytest.raises(UnsupportedError, match="the model that was quantized"):
        model.dequantize()
    rows = torch.nn.functional.embedding(ids, table.weight, padding_idx=0)
    assert torch.equal(rows, table(ids))
    with pytest.raises(UnsupportedError, match=r"quantizing model\.embed_tokens.*takes them, and nothing else"):
        torch.nn.functional.linear(rows, table.weight)


def test_a_trainer_teaches_what_stands_beside_the_layers(tiny: Path, tmp_path: Path) -> None:
    """As adapters do. Of PEFT's own models the trainer asks the quantizer; of adapters that transformers adds, not."""
    from transformers import Trainer, TrainingArguments

    fewbit.quantize(tiny, "int4/g16", method="rtn", out=tmp_path / "out")
    model, ids = fewbit.load(tmp_path / "out"), torch.arange(3, 19)
    codes = {name: array.clone() for name, array in model.state_dict().items() if "weight_" in name}
    model.requires_grad_(False)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    adapter = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    torch.nn.init.zeros_(adapter.weight)
    layer.register_forward_hook(lambda _, inputs, y: y + adapter(inputs[0]))
    layer.add_module("adapter", adapter)
    assert model.hf_quantizer.is_trainable
    model._hf_peft_config_loaded = True
    options = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path / "run"), **options)
    Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids}] * 16).train()
    assert adapter.weight.abs().max() > 0
    assert all(torch.equal(model.state_dict()[name], array) for name, array in codes.items())


def test_a_class_that_lacks_what_was_quantized_is_told_from_a_broken_folder(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    fewbit.quantize(tiny, "int4/g32/asym", out=tmp_path / "out")
    with pytest.raises(InputError, match="a LlamaModel; what was quantized is a LlamaForCausalLM"):
        AutoModel.from_pretrained(tmp_path / "out")
    with pytest.raises(CorruptFileError, match="leave out what changes its configuration"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", num_hidden_layers=1)


def test_load_refuses_what_is_not_what_was_written(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewbit.quantize(tiny, "int4/g32/asym", out=out)
    shard = out / "model-00002-of-00004.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match="bytes differ"):
        fewbit.load(out)
    shard.write_bytes(content)
    manifest = json.loads((out / "fewbit.json").read_text())
    del manifest["files"][shard.name]
    (out / "fewbit.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match=f"{shard.name}; the manifest holds no hash of it"):
        fewbit.load(out)
    shard.unlink()
    with pytest.raises(CorruptFileError, match=r"00002-of-00004\.safetensors"):
        fewbit.load(out)
    with pytest.raises(InputError, match="there is no such folder"):
        fewbit.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no fewbit\.json"):
        fewbit.load(tiny)


FORKED = """
import os, sys
assert not {'fewbit', 'torch', 'transformers'} & sys.modules.keys()  # fewbit.pth imports nothing
import torch.distributed.fsdp, torch.distributed.tensor  # most of what transformers imports, once for all
for order in sys.argv[1:]:
    if not os.fork():
        exec(order)
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m
        assert 'fewbit' in m, order
        break
    assert os.wait()[1] == 0, order
"""


def test_the_plug_in_registers_itself_whatever_is_imported_first() -> None:
    orders = ["import fewbit, transformers", "import transformers.quantizers.auto, fewbit", "pass  # fewbit.pth alone"]
    done = subprocess.run([sys.executable, "-c", FORKED, *orders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_activations_are_rounded_token_by_token(tiny: Path, tmp_path: Path) -> None:
    from fewbit.kernels.reference import round_activations

    result = fewbit.quantize(tiny, "W8A8", out=tmp_path / "out")
    assert {layer["activation"] for layer in result.manifest["layers"] if layer["kind"] == "linear"} == {
        "int8/channel/sym"
    }
    layer = fewbit.load(tmp_path / "out").model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100.0], [0.01]])
    scale = (2 * x.abs().amax(1, keepdim=True) / 255).half().float()
    rounded = scale * (x / scale).round().clamp(-128, 127)
    assert torch.equal(round_activations(x, layer.activation), rounded)
    expected = rounded.double() @ layer.qtensor().dequantize().double().T
    assert torch.allclose(layer(x).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    weights_only = fewbit.quantize(tiny, "W8A16", out=tmp_path / "other")
    assert result.manifest["check"]["kl_mean"] != weights_only.manifest["check"]["kl_mean"]


def test_the_user_chooses_int8_activations_when_loading(tiny: Path, tmp_path: Path) -> None:
    from fewbit.kernels.reference import round_activations

    fewbit.quantize(tiny, "int4/g32/asym", out=tmp_path / "out")
    exact, rounding = fewbit.load(tmp_path / "out"), fewbit.load(tmp_path / "out", activation="int8/g32")
    layer, other = exact.model.layers[0].mlp.up_proj, rounding.model.layers[0].mlp.up_proj
    assert other.activation.name == "int8/g32/sym" and layer.activation is None
    assert native.available() == other.prepared.kernel.startswith("int8_linear")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = round_activations(x, other.activation).double() @ layer.qtensor().dequantize().double().T
    torch.testing.assert_close(other(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    ids = torch.arange(3, 23).reshape(1, 20)
    with torch.no_grad():
        difference = (exact(ids).logits - rounding(ids).logits).norm() / exact(ids).logits.norm()
    assert 0 < float(difference) < 0.1
    rounding.save_pretrained(tmp_path / "again")
    assert (
        fewbit.containers.files.read_json(tmp_path / "again" / "config.json")["quantization_config"]
        == (fewbit.containers.files.read_json(tmp_path / "out" / "config.json")["quantization_config"])
    )
    with pytest.raises(SpecError, match="int9"):
        fewbit.load(tmp_path / "out", activation="int9")


def test_signs_times_signs_by_scheme_or_by_choice(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, "W1A1", out=tmp_path / "both", force=True)
    fewbit.quantize(tiny, "sign/channel", out=tmp_path / "weights", force=True)
    layer = fewbit.load(tmp_path / "both").model.layers[0].mlp.up_proj
    chosen = fewbit.load(tmp_path / "weights", activation="sign/channel").model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    scale = x.double().abs().mean(1, keepdim=True).half().double()
    expected = scale * x.sign().double() @ layer.qtensor().dequantize().double().T
    for found in (layer, chosen):
        assert native.available() == found.prepared.kernel.startswith("xnor_linear")
        torch.testing.assert_close(found(x).double(), expected, rtol=1e-6, atol=0)


def test_layers_quantized_with_their_inputs_keep_them_whatever_is_asked(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, "W8A8", out=tmp_path / "out")
    model = fewbit.load(tmp_path / "out", activation="int8/g32")
    assert model.model.layers[0].mlp.up_proj.activation.name == "int8/channel/sym"


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_saving_a_loaded_model_gives_the_same_arrays(
    family: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    fewbit.quantize(tiny_family(family), "int4/g16/asym", out=tmp_path / "out", force=True)
    model = fewbit.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    before, after = (
        {name: tensor for path in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in ("out", "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("activation", [None, "int8/channel/sym"])
@torch.no_grad()
def test_a_layer_that_is_a_sum_of_terms_is_saved_and_loaded(
    activation: str | None, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from fewbit.integrations.transformers import FewbitConfig

    model, out = AutoModelForCausalLM.from_pretrained(tiny_family("llama")), tmp_path / "out"
    modules, plain = {}, {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        linear = model.get_submodule(name)
        weight = linear.weight.detach()
        outliers = torch.where(weight.abs() > 2 * weight.std(), weight, 0.0)
        base = methods.rtn(weight - outliers, formats.parse("int4/g16/asym")).repack(layouts.named("dense"))
        terms = Terms(base.shape, (Dense(base), Sparse.of(outliers)), None, torch.full((base.shape[1],), 1.5))
        layer = QuantLinear.of(linear, terms, activation)
        plain[name] = terms.dequantize()
        modules[name] = {"kind": "linear", "shape": list(terms.shape), "terms": layer.plain, "activation": activation}
        model.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], layer)
    model.config.quantization_config = FewbitConfig(modules)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    model.save_pretrained(out)
    stored = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    file = open_safetensors(out / "model.safetensors")
    assert stored.keys() == modules.keys() and "model.layers.1.mlp.down_proj.weight_1_pointers" in file.entries
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(ids).logits, expected)
    for name, weight in plain.items():
        layer = loaded.get_submodule(name)
        assert isinstance(layer, QuantLinear) and torch.equal(layer.weight_of().dequantize(), weight)
        with pytest.raises(UnsupportedError, match="sum of terms"):
            layer.qtensor()


def test_a_layer_of_no_known_term_is_refused(tiny_family: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_family("llama")
    config = json.loads((folder / "config.json").read_text())
    entry = {"kind": "linear", "shape": [32, 32], "terms": {"kind": "dance", "shape": [32, 32]}}
    config["quantization_config"] = {"quant_method": "fewbit", "modules": {"model.layers.0.self_attn.q_proj": entry}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match="description of a weight"):
        AutoModelForCausalLM.from_pretrained(folder)
