# SPDX-License-Identifier: Apache-2.0
"""A model run block by block from disk is the model: same logits, same inputs at every matrix, one block in memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, ids, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fewbit.errors import InputError, UnsupportedError
from fewbit.model import checkpoint
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import Inputs, StreamedModel

MOE = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v3"]

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(folder: Path) -> StreamedModel:
    return StreamedModel.open(open_checkpoint(folder))


def reference(folder: Path) -> nn.Module:
    """What transformers loads from the same folder, its experts run one after another as here."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def begun(model: StreamedModel, tokens: Tensor) -> Inputs:
    for path in model.before:
        model.load(path)
    inputs = model.begin(tokens)
    for path in model.before:
        model.free(path)
    return inputs


def ended(model: StreamedModel, hidden: Tensor) -> Tensor:
    for path in model.after:
        model.load(path)
    return model.logits(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_streamed_logits_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    make(family, tmp_path)
    tokens = ids()
    model = opened(tmp_path)
    assert model.materialised() == 0
    inputs = begun(model, tokens)
    assert model.materialised() == 0
    hidden = inputs.hidden
    for index, path in enumerate(model.blocks):
        model.load(path)
        block = sum(value.numel() for value in model.module.get_submodule(path).parameters())
        assert model.materialised() == block
        hidden = model.run_block(index, hidden, inputs)
        model.free(path)
    got = ended(model, hidden)
    assert torch.equal(got, reference(tmp_path)(tokens).logits)
    assert model.unused == []


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_and_kept_name_every_parameter_once(family: str, tmp_path: Path) -> None:
    make(family, tmp_path)
    model = opened(tmp_path)
    named = [site.parameter for site in model.sites] + [name for name, _ in model.kept]
    every = [name for name, _ in model.module.named_parameters(remove_duplicate=False)]
    assert sorted(named) == sorted(every)
    for site in model.sites:
        shape = model.module.get_parameter(site.parameter).shape
        stored = (site.shape[1], site.shape[0]) if site.transposed else site.shape
        assert tuple(shape) == ((site.experts, *stored) if site.kind == "experts" else stored)
    inside = [site for site in model.sites if site.block is not None]
    assert {site.block for site in inside} == set(range(len(model.blocks)))
    assert all(reason for _, reason in model.kept)
    # Norms, biases, positions and routers are what is kept: never a matrix of a block that multiplies activations.
    routers = {name for name, reason in model.kept if reason.startswith("a router")}
    assert bool(routers) == (family in MOE)
    for name, reason in model.kept:
        if model.module.get_parameter(name).ndim > 1:
            assert reason.startswith(("a router", "an embedding", "outside", "a bias", "a norm")), (name, reason)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_observe_sees_what_each_matrix_sees(family: str, tmp_path: Path) -> None:
    make(family, tmp_path)
    tokens = ids()
    whole = reference(tmp_path)
    seen: dict[str, Tensor] = {}
    for name, module in whole.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(
                lambda module, x, name=name: seen.__setitem__(name, x[0].reshape(-1, x[0].shape[-1]).clone())
            )
    whole(tokens)
    model = opened(tmp_path)
    inputs = begun(model, tokens)
    hidden = inputs.hidden
    for index, path in enumerate(model.blocks):
        model.load(path)
        got: dict[str, Tensor] = {}
        with model.observe(index, lambda name, x, expert, got=got: got.__setitem__(name, x.clone())):
            hidden = model.run_block(index, hidden, inputs)
        plain = {site.name for site in model.sites if site.block == index and site.kind != "experts"}
        assert plain <= got.keys() <= {site.name for site in model.sites if site.block == index}
        for name in plain:
            assert got[name].shape[1] == model.site(name).shape[1]
            assert torch.equal(got[name], seen[name]), name
        model.run_block(index, hidden, inputs)
        model.free(path)


@pytest.mark.parametrize("family", MOE)
@torch.no_grad()
def test_observe_sees_the_tokens_routed_to_each_expert(family: str, tmp_path: Path) -> None:
    """Against the routing itself: token t goes to expert e when e is among its top k."""
    make(family, tmp_path)
    model = opened(tmp_path)
    inputs = begun(model, ids())
    index = len(model.blocks) - 1
    model.load(model.blocks[index])
    stacked = [site for site in model.sites if site.block == index and site.kind == "experts"]
    assert {site.name.rpartition(".")[2] for site in stacked} == {"gate_up_proj", "down_proj"}
    called: list[tuple[Tensor, Tensor]] = []
    experts = model.module.get_submodule(stacked[0].name.rpartition(".")[0])
    handle = experts.register_forward_pre_hook(lambda module, x: called.append((x[0], x[1])))
    got: dict[tuple[str, int], Tensor] = {}
    with model.observe(index, lambda name, x, expert: got.__setitem__((name, expert), x.clone())):
        model.run_block(index, inputs.hidden, inputs)
    handle.remove()
    [(hidden, chosen)] = called
    hidden = hidden.reshape(-1, hidden.shape[-1])
    gate_up, down = stacked[0].name, stacked[1].name
    for expert in range(stacked[0].experts):
        routed = hidden[(chosen.reshape(hidden.shape[0], -1) == expert).any(-1)]
        if not len(routed):
            assert (gate_up, expert) not in got
            continue
        order = torch.unique(got[gate_up, expert], dim=0)
        assert torch.equal(order, torch.unique(routed, dim=0))
        assert got[gate_up, expert].shape == routed.shape
        assert got[down, expert].shape == (len(routed), model.site(down).shape[1])
    assert sum(len(x) for (name, _), x in got.items() if name == gate_up) == chosen.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt-oss", "phi3"])
@torch.no_grad()
def test_weights_are_rows_by_columns_and_can_be_written(family: str, tmp_path: Path) -> None:
    """weight() is the matrix W of y = x W^T for every kind of site, and what is written is what runs."""
    make(family, tmp_path)
    model = opened(tmp_path)
    inputs = begun(model, ids())
    model.load(model.blocks[0])
    before = model.run_block(0, inputs.hidden, inputs)
    products: dict[str, tuple[Tensor, Tensor]] = {}
    for site in model.sites:
        if site.block == 0 and site.kind != "experts":
            model.module.get_submodule(site.name).register_forward_hook(
                lambda module, x, y, name=site.name: products.__setitem__(name, (x[0], y))
            )
    model.run_block(0, inputs.hidden, inputs)
    for site in [site for site in model.sites if site.block == 0]:
        weight = model.weight(site.name)
        assert weight.shape == ((site.experts, *site.shape) if site.kind == "experts" else site.shape)
        if site.name in products:
            x, y = products[site.name]
            bias = model.module.get_submodule(site.name).bias
            want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            bound = x.abs() @ weight.abs().T * 1e-5 + 1e-5
            assert ((want - y).abs() <= bound).all()
        kept = weight.clone()
        model.set_weight(site.name, torch.zeros_like(weight))
        assert not torch.equal(model.run_block(0, inputs.hidden, inputs), before), site.name
        model.set_weight(site.name, kept)
    assert torch.equal(model.run_block(0, inputs.hidden, inputs), before)
    with pytest.raises(InputError, match="shape"):
        model.set_weight(model.sites[1].name, torch.zeros(3, 5))


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
@torch.no_grad()
def test_threads_do_not_disturb_one_another(family: str, tmp_path: Path) -> None:
    make(family, tmp_path)
    model = opened(tmp_path)
    for path in model.before:
        model.load(path)
    samples = [ids(1, 5 + 3 * n, seed=n) for n in range(8)]
    local = threading.local()

    def run(tokens: Tensor) -> tuple[Tensor, list[tuple[str, int | None, Tensor]]]:
        local.seen = []
        inputs = model.begin(tokens)
        return model.run_block(0, inputs.hidden, inputs), local.seen

    model.load(model.blocks[0])
    with model.observe(0, lambda name, x, expert: local.seen.append((name, expert, x.clone()))):
        alone = [run(tokens) for tokens in samples]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, samples * 4))
    for number, (hidden, seen) in enumerate(together):
        want, want_seen = alone[number % len(samples)]
        assert torch.equal(hidden, want)
        assert [entry[:2] for entry in seen] == [entry[:2] for entry in want_seen]
        assert all(torch.equal(x[2], y[2]) for x, y in zip(seen, want_seen, strict=True))


@torch.no_grad()
def test_arguments_are_shared_between_samples_and_never_confused(tmp_path: Path) -> None:
    make("gemma2", tmp_path)
    model = opened(tmp_path)
    for path in model.before:
        model.load(path)
    first, second, longer = model.begin(ids(1, 9, 1)), model.begin(ids(1, 9, 2)), model.begin(ids(1, 11, 3))
    assert first.calls is second.calls
    assert longer.calls is not first.calls
    assert not torch.equal(first.hidden, second.hidden)


def test_opening_leaves_the_random_state_alone(tmp_path: Path) -> None:
    make("gpt2", tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = opened(tmp_path)
    model.load("")
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_tied_head_shares_the_embedding_when_loaded_and_stands_alone_otherwise(tmp_path: Path) -> None:
    make("llama-tied", tmp_path)
    model = opened(tmp_path)
    assert model.site("lm_head").tied_to == "model.embed_tokens"
    model.load("lm_head")
    alone = model.weight("lm_head").clone()
    model.free("lm_head")
    model.load("model.embed_tokens")
    model.load("lm_head")
    assert model.weight("lm_head").data_ptr() == model.weight("model.embed_tokens").data_ptr()
    assert torch.equal(model.weight("lm_head"), alone)
    model.free("model.embed_tokens")
    assert torch.equal(model.weight("lm_head"), alone)
    assert model.materialised() == alone.numel()


@torch.no_grad()
def test_a_head_stored_beside_the_embedding_is_tied_only_if_equal(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make("llama-tied", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file, {"format": "pt"})
    assert opened(tmp_path).site("lm_head").tied_to == "model.embed_tokens"
    save_file({**tensors, "lm_head.weight": embedding + 1}, file, {"format": "pt"})
    model = opened(tmp_path)
    assert model.site("lm_head").tied_to is None
    model.load("lm_head")
    assert torch.equal(model.weight("lm_head"), embedding + 1)
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding + 2}, file, {"format": "pt"})
    model = opened(tmp_path)
    assert model.site("model.embed_tokens").tied_to == "lm_head"
    model.load("model.embed_tokens")
    assert torch.equal(model.weight("model.embed_tokens"), embedding + 2)


def test_loading_in_half_precision(tmp_path: Path) -> None:
    make("llama", tmp_path)
    model = opened(tmp_path)
    model.load("model.layers.1", torch.bfloat16)
    assert model.weight("model.layers.1.mlp.up_proj").dtype == torch.bfloat16


def test_what_is_not_loaded_or_not_there_is_said(tmp_path: Path) -> None:
    make("llama", tmp_path)
    model = opened(tmp_path)
    with pytest.raises(InputError, match="not loaded"):
        model.weight("model.layers.0.mlp.up_proj")
    with pytest.raises(InputError, match="none of that name"):
        model.weight("model.layers.7.mlp.up_proj")
    with pytest.raises(InputError, match="no parameter there"):
        model.load("model.layers.7")


def test_an_architecture_without_blocks_known_here_is_named(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("ctrl", vocab_size=31, n_embd=8, n_layer=2, n_head=2, dff=16, n_positions=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"CTRLLMHeadModel.*ctrl.*families"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("family", "asked"), [("llama", False), ("llama-tied", False), ("qwen3-moe", True), ("gpt-oss", True)]
)
def test_transformers_table_of_names_is_made_only_where_it_has_something_to_say(
    family: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(family, tmp_path)
    made = []
    table = checkpoint.get_model_conversion_mapping
    monkeypatch.setattr(checkpoint, "get_model_conversion_mapping", lambda model: made.append(model) or table(model))
    opened(tmp_path)
    assert bool(made) == asked


@pytest.mark.parametrize("change", ["turned", "renamed"])
def test_the_table_of_names_is_made_where_a_tensor_differs_from_its_parameter(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("llama", tmp_path)
    there, model = open_checkpoint(tmp_path), opened(tmp_path).module
    name, shape = "model.layers.0.mlp.up_proj.weight", there.shape
    assert there.transforms(model, model.state_dict()) == []
    if change == "renamed":
        keys = ["up.weight" if key == name else key for key in list(there.keys())]
        monkeypatch.setattr(there, "keys", lambda: keys)
        monkeypatch.setattr(there, "shape", lambda key: shape(name if key == "up.weight" else key))
    else:
        monkeypatch.setattr(there, "shape", lambda key: shape(key)[::-1] if key == name else shape(key))
    monkeypatch.setattr(checkpoint, "get_model_conversion_mapping", lambda model: ["the table"])
    assert there.transforms(model, model.state_dict()) == ["the table"]
