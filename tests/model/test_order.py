# SPDX-License-Identifier: Apache-2.0
"""A block run group by group gives every layer what a direct run gives it, and multiplies each token once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, ids, make
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.order import Order
from fewbit.model.replay import checked_order, output, replaying
from fewbit.model.sites import in_block
from fewbit.model.stream import Inputs, StreamedModel

ROUTED = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss"]
AS_A_WHOLE = [*ROUTED, "opt", "bloom", "mpt", "deepseek-v3"]
"""Experts see what is routed to them; the others add the residual inside of what would have to be closed."""
BY_GROUP = [family for family in FAMILIES if family not in AS_A_WHOLE]


@pytest.fixture(autouse=True)
def one_thread():
    """Bits may differ between thread counts; here they must not differ at all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def opened(family: str, folder: Path, block: int = 1) -> tuple[StreamedModel, Inputs]:
    """A tiny model with one block loaded, and what the blocks are called with for three windows."""
    make(family, folder)
    model = StreamedModel.open(open_checkpoint(folder))
    for path in model.before:
        model.load(path)
    inputs = model.begin(ids(batch=3, tokens=16))
    model.load(model.blocks[block])
    return model, inputs


def direct(model: StreamedModel, block: int, hidden: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """The input of every site in a run of the whole block, and its output as ""."""
    seen: dict[str, Tensor] = {}
    with model.observe(block, lambda name, x, expert: seen.__setitem__(name, x.clone())):
        return {"": model.run_block(block, hidden, inputs), **seen}


def disturb(model: StreamedModel, names: tuple[str, ...]) -> None:
    """What quantizing does to the layers that come after: other weights."""
    for name in names:
        weight = model.weight(name)
        model.set_weight(name, (weight * 4).round() / 4)


@pytest.mark.parametrize("family", BY_GROUP)
def test_inputs_are_those_of_a_direct_run_with_the_groups_before_quantized(family: str, tmp_path: Path) -> None:
    model, inputs = opened(family, tmp_path)
    hidden = inputs.hidden + 0.5
    sites = [site.name for site in in_block(model.sites, 1)]
    order = checked_order(model, 1, inputs.hidden, inputs)
    assert isinstance(order, Order), order
    assert sorted(name for group in order.groups for name in group) == sorted(sites)
    ran: Counter[str] = Counter()
    for name in sites:
        module = model.module.get_submodule(name)
        module.register_forward_hook(lambda module, x, y, name=name: ran.update([name]))
    kept: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for group in range(len(order.groups) + 1):
        before = ran.copy()
        expected = direct(model, 1, hidden, inputs)
        ran = before
        for closing in order.closings:
            if closing.group == group - 1:
                outputs[closing.module] = output(model, closing, kept[closing.module])
        with replaying(model, 1, order, group) as step:
            got = step(hidden, inputs, outputs)
        if group == len(order.groups):
            assert torch.equal(got, expected[""])
            break
        for name in order.groups[group]:
            assert torch.equal(got.reshape(expected[name].shape), expected[name]), name
        for closing in order.closings:
            if closing.group == group:
                kept[closing.module] = closing.inputs.stored(got, hidden)
        disturb(model, order.groups[group])
    assert ran == Counter(sites)


@pytest.mark.parametrize("family", AS_A_WHOLE)
def test_blocks_that_cannot_be_cut_say_why(family: str, tmp_path: Path) -> None:
    model, inputs = opened(family, tmp_path)
    reason = checked_order(model, 1, inputs.hidden, inputs)
    assert isinstance(reason, str)
    routed = family in ROUTED or family == "deepseek-v3"  # whose first block has no experts
    assert ("routed to it" if routed else "would have to run again") in reason
    if family == "deepseek-v3":
        model.load(model.blocks[0])
        assert "would have to run again" in str(checked_order(model, 0, inputs.hidden, inputs))


def test_norms_are_idle_once_what_they_feed_is_closed(tmp_path: Path) -> None:
    model, inputs = opened("llama", tmp_path)
    order = checked_order(model, 1, inputs.hidden, inputs)
    assert isinstance(order, Order)
    before, after = (f"model.layers.1.{name}_layernorm" for name in ("input", "post_attention"))
    assert [order.idle(group) for group in range(5)] == [[], [], [before], [before], [before, after]]


def test_norms_give_what_the_group_before_has_seen_without_running_again(tmp_path: Path) -> None:
    model, inputs = opened("llama", tmp_path)
    order = checked_order(model, 1, inputs.hidden, inputs)
    assert isinstance(order, Order)
    before, after = (f"model.layers.1.{name}_layernorm" for name in ("input", "post_attention"))
    assert [order.giver(group) for group in range(6)] == ["", before, "", after, "", ""]
    seen, ran = direct(model, 1, inputs.hidden, inputs), list[str]()
    model.module.get_submodule(before).register_forward_hook(lambda *_: ran.append(before))
    names = (f"model.layers.1.self_attn.{name}_proj" for name in ("q", "o"))
    given, wanted = (seen[name].reshape(inputs.hidden.shape) for name in names)
    with replaying(model, 1, order, 1) as step:
        assert torch.equal(step(inputs.hidden, inputs, {before: given}), wanted)
        assert not ran
        assert torch.equal(step(inputs.hidden, inputs, {}), wanted)
        assert ran == [before]


def test_a_module_that_changes_the_output_of_its_last_layer_is_not_closed(tmp_path: Path) -> None:
    model, inputs = opened("llama", tmp_path)
    attention = model.module.get_submodule("model.layers.1.self_attn")
    attention.register_forward_hook(lambda module, x, y: (y[0] + 0, *y[1:]))
    reason = checked_order(model, 1, inputs.hidden, inputs)
    assert reason == "model.layers.1.self_attn.q_proj would have to run again for the layers after " + (
        "model.layers.1.self_attn.o_proj"
    )


def test_a_layer_that_is_called_twice_or_not_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = opened("llama", tmp_path)
    mlp = model.module.get_submodule("model.layers.1.mlp")
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: self.down_proj(self.up_proj(x) * self.up_proj(x)))
    assert "up_proj is called more than once" in str(checked_order(model, 1, inputs.hidden, inputs))
    monkeypatch.setattr(
        type(mlp), "forward", lambda self, x: self.down_proj(self.up_proj(x) * (x @ self.gate_proj.weight.T))
    )
    assert "gate_proj is not called as a module" in str(checked_order(model, 1, inputs.hidden, inputs))


def test_a_norm_that_is_used_beside_the_layers_runs_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = opened("llama", tmp_path)

    def forward(self: Any, hidden_states: Tensor, **named: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden = normed + self.self_attn(hidden_states=normed, **named)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    order = checked_order(model, 1, inputs.hidden, inputs)
    assert isinstance(order, Order)
    assert order.feeders == order.givers == ()


def test_a_block_that_never_computes_the_same_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = opened("llama", tmp_path)
    good = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, x, **named: good(self, x + 1e-3 * torch.rand(()), **named)
    )
    assert "a replay changes" in str(checked_order(model, 1, inputs.hidden, inputs))
