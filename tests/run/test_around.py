# SPDX-License-Identifier: Apache-2.0
"""Powers chosen by the output of the module around the layers: written out in float64, and beside llmcompressor's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fewbit
from fewbit.model.checkpoint import open_checkpoint
from fewbit.recipe import Recipe, Rule, Step
from fewbit.run import around
from oracle.awq_oracle import rounded, scales

Short = Callable[..., Any]
GOLDEN = Path(__file__).parent.parent / "golden" / "awq.npz"
HEADS, SHARED, WIDTH = 4, 2, 16
"""Of the models here: heads, those of keys and values, and their width."""
GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[float], int]]:
    """What each power cost at a module, and the windows it was called with, by the module's path."""
    found: dict[str, tuple[list[float], int]] = {}
    good = around.costs

    def note(run: Any, tasks: Any, powers: Any, path: str, calls: Any) -> list[float]:
        lost = good(run, tasks, powers, path, calls)
        found[path] = (lost, len(calls) * run.texts.batch)
        return lost

    monkeypatch.setattr(around, "costs", note)
    return found


def attention(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Llama's, for ``x`` (windows, tokens, columns)."""
    tokens = x.shape[1]
    angles = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turned(heads: np.ndarray) -> np.ndarray:
        one, two = heads[..., : WIDTH // 2], heads[..., WIDTH // 2 :]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    queries, keys, values = (
        (x @ weights[name].T).reshape(*x.shape[:2], -1, WIDTH) for name in ("q_proj", "k_proj", "v_proj")
    )
    queries, keys, made = turned(queries), turned(keys), np.empty((*x.shape[:2], HEADS, WIDTH))
    for head in range(HEADS):
        of = head // (HEADS // SHARED)
        scores = queries[:, :, head] @ keys[:, :, of].transpose(0, 2, 1) / WIDTH**0.5
        scores = np.where(np.tril(np.ones((tokens, tokens))) > 0, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        made[:, :, head] = shares / shares.sum(-1, keepdims=True) @ values[:, :, of]
    return made.reshape(*x.shape[:2], -1) @ weights["o_proj"].T  # type: ignore[no-any-return]


def mlp(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    gate = x @ weights["gate_proj"].T
    return (gate / (1 + np.exp(-gate)) * (x @ weights["up_proj"].T)) @ weights["down_proj"].T  # type: ignore[no-any-return]


def entering(model: LlamaForCausalLM, ids: Tensor) -> dict[str, np.ndarray]:
    """What every attention and MLP of ``model`` is called with, float64."""
    seen: dict[str, np.ndarray] = {}
    for path, module in model.named_modules():
        if path.endswith(tuple(GROUPS)):

            def note(module: Any, arguments: Any, named: Any, path: str = path) -> None:
                seen[path] = (arguments[0] if arguments else named["hidden_states"]).double().numpy()

            module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return seen


@pytest.fixture(scope="module")
def uneven(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads that are grouped and norms that make some channels large."""
    folder = tmp_path_factory.mktemp("uneven")
    model, words = LlamaForCausalLM.from_pretrained(tiny), open_checkpoint(tiny).tokenizer()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).exp()
        elif "layers" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_equals_the_definition(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched: dict[str, tuple[list[float], int]]
) -> None:
    """Every power again, in float64: the same are chosen, each alone at its minimum. Inputs are those of the quantized
    model, their sizes of all windows, the errors of 3 windows, in whole batches of 2."""
    monkeypatch.setattr(fewbit.run.state, "BATCH_TOKENS", 64)
    asked = {"method": "rtn", "head": "float", "transforms": [{"name": "awq", "samples": 3}]}
    data = {"samples": 8, "context": 32, "calibration_dtype": "float32"}
    manifest = fewbit.quantize(uneven, "int3/g32/asym", out=tmp_path / "out", **asked, **data).manifest
    records = {record["name"]: record for record in manifest["layers"]}
    ids = fewbit.run.calibrate.calibration(open_checkpoint(uneven).tokenizer(), None, 8, 32, 0).ids
    inputs = entering(LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), ids)
    floating = LlamaForCausalLM.from_pretrained(uneven, dtype=torch.float64)
    assert len(inputs) == 4
    for path, x in inputs.items():
        kind = path.rpartition(".")[2]
        run, module = (attention, mlp)[kind == "mlp"], floating.get_submodule(path)
        weights = {name: part.weight.detach().numpy() for name, part in module.named_children() if "proj" in name}
        wanted, lost = run(x[:4], weights), []
        for step in range(20):
            s = scales(x.reshape(-1, 64), step / 20)
            s = 1 / (1 / s).astype(np.float16).astype(np.float64)  # as it is stored
            tried = {name: rounded(weights[name] * s, 32, 8) / s for name in GROUPS[kind]}
            lost.append(float(((run(x[:4], {**weights, **tried}) - wanted) ** 2).sum()))
        best = int(np.argmin(lost))
        np.testing.assert_allclose(searched[path][0], lost, rtol=0.02)  # sums in float32 move a code here and there
        assert sorted(lost)[1] > 1.003 * lost[best] and 0 < best < 19
        for name in GROUPS[kind]:
            assert records[f"{path}.{name}"]["around"] == {"module": path, "power": best / 20}
        assert searched[path][1] == 4
        last = {"self_attn": "o_proj", "mlp": "down_proj"}[kind]
        assert records[f"{path}.{last}"]["around"] == {"module": path, "power": None}
    assert {record["note"] for record in records.values()} == {""}


@pytest.mark.parametrize("kind", list(GROUPS))
def test_chooses_what_llmcompressor_chooses(
    tmp_path: Path,
    recorded: Callable[..., Any],
    searched: dict[str, tuple[list[float], int]],
    kind: str,
) -> None:
    """Everything else in float, as it is there. It keeps s and the scales of groups in float32, we in float16."""
    shape = {"intermediate_size": 128, "num_attention_heads": HEADS, "num_key_value_heads": SHARED}
    _, saved, keys = recorded(GOLDEN, **shape)
    assert keys.missing_keys in ([], ["lm_head.weight"])
    ids, folder = saved["ids"].long(), tmp_path / "model"
    rules = [Rule(f"re:.*{kind}.*", "int3/g32/asym", transforms=(Step("awq"),)), Rule("*", "float")]
    recipe = Recipe((Rule("kind:embedding", "float"), Rule("kind:head", "float"), *rules))
    data_ = {"calibration": tmp_path / "text.txt", "samples": 12, "context": 64, "calibration_dtype": "float32"}
    manifest = fewbit.quantize(folder, recipe, out=tmp_path / "out", force=True, **data_).manifest
    theirs = saved[kind].numpy()[:20]
    path = f"model.layers.0.{kind}"
    np.testing.assert_allclose(np.array(searched[path][0]) / (ids.numel() * 64), theirs, rtol=0.05)
    powers = {r["around"]["power"] for r in manifest["layers"] if r["name"].endswith(GROUPS[kind])}
    assert powers == {int(theirs.argmin()) / 20}


def test_same_bytes_at_any_thread_count(short: Short, hashes: Callable[[Path], Any], tmp_path: Path) -> None:
    for threads in (1, 3):
        short(tmp_path / str(threads), method="rtn", threads=threads, transforms=["awq"])
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("phi", {"q_proj": "layers.0", "fc1": "layers.0", "dense": "self_attn"}),
        ("gpt2", {"c_attn": "attn", "c_fc": "mlp"}),
        ("mixtral", {"q_proj": "self_attn", "o_proj": "self_attn"}),
        ("deepseek-v3", {"q_a_proj": "self_attn", "q_b_proj": "self_attn", "o_proj": "self_attn"}),
    ],
)
def test_the_smallest_module_that_is_called(
    tiny_family: Callable[[str], Path], tmp_path: Path, family: str, modules: dict[str, str | None]
) -> None:
    """Or none where a block runs as a whole, and then the record says so."""
    rules = [Rule("kind:linear", "int4/g32/asym", transforms=(Step("awq"),))]
    if family == "gpt2":
        rules = [Rule("kind:conv1d", "int4/g32/asym", transforms=(Step("awq"),))]
    recipe = Recipe((Rule("kind:embedding", "float"), Rule("kind:head", "float"), *rules))
    manifest = fewbit.quantize(tiny_family(family), recipe, out=tmp_path / "out", samples=4, context=32).manifest
    first = {r["name"].rpartition(".")[2]: r for r in manifest["layers"] if r["block"] == 0}
    for name, module in modules.items():
        if module is None:
            assert "around" not in first[name] and "by the layer's own output" in first[name]["note"]
        else:
            assert first[name]["around"]["module"].endswith(module) and first[name]["note"] == ""


def test_a_mixture_of_experts_equals_the_definition(
    tiny_family: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    searched: dict[str, tuple[list[float], int]],
) -> None:
    """The attention and the shared expert of a routed block, in float64: a whole model runs for every power, whose
    module gives its output with the layers in question rounded and all else, the router too, in float."""
    monkeypatch.setattr(fewbit.run.state, "BATCH_TOKENS", 64)
    folder = _made_uneven(tiny_family("qwen2-moe"))
    rules = [Rule("re:.*(attn|shared_expert)[.].*", "int3/g32/asym", transforms=(Step("awq", {"samples": 3}),))]
    recipe = Recipe((*rules, Rule("*", "float"), Rule("kind:embedding", "float"), Rule("kind:head", "float")))
    data = {"samples": 8, "context": 32, "calibration_dtype": "float32"}
    manifest = fewbit.quantize(folder, recipe, out=tmp_path / "out", force=True, **data).manifest
    records = {record["name"]: record for record in manifest["layers"]}
    ids = fewbit.run.calibrate.calibration(open_checkpoint(folder).tokenizer(), None, 8, 32, 0).ids
    for kind, names in {"self_attn": GROUPS["self_attn"], "mlp.shared_expert": GROUPS["mlp"]}.items():
        path = f"model.layers.0.{kind}"
        wanted, x = _given(folder, ids, path, names[0], {})
        s_of = {power: scales(x.reshape(-1, 32), power) for power in np.arange(20) / 20}
        lost = []
        for s in s_of.values():
            s = 1 / (1 / s).astype(np.float16).astype(np.float64)
            made, _ = _given(
                folder, ids[:4], path, names[0], {name: lambda w, s=s: rounded(w * s, 32, 8) / s for name in names}
            )
            lost.append(float(((made - wanted[: len(made)]) ** 2).sum()))
        best = int(np.argmin(lost))
        np.testing.assert_allclose(searched[path][0], lost, rtol=0.02)
        assert sorted(lost)[1] > 1.003 * lost[best] and 0 < best < 19 and searched[path][1] == 4
        last = {"self_attn": "o_proj"}.get(kind, "down_proj")
        assert all(records[f"{path}.{name}"]["around"] == {"module": path, "power": best / 20} for name in names)
        assert records[f"{path}.{last}"]["around"] == {"module": path, "power": None}
    assert {record["note"] for record in records.values()} == {""}


def _made_uneven(folder: Path) -> Path:
    """The model in ``folder``, in place, with norms that make some channels large."""
    model, generator = AutoModelForCausalLM.from_pretrained(folder), torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).exp()
        elif "layers" in name and parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _given(
    folder: Path, ids: Tensor, path: str, first: str, changes: dict[str, Callable[[np.ndarray], np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """What the module at ``path`` gives in the float64 model, weights of the layers in it changed, and what its layer
    ``first`` sees, (windows * tokens, columns) each."""
    model, seen = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager"),
        list[Tensor](),
    )
    module = model.get_submodule(path)
    for name, change in changes.items():
        weight = module.get_submodule(name).weight
        weight.copy_(torch.from_numpy(change(weight.numpy())))
    module.register_forward_hook(lambda _, arguments, out: seen.append(out[0] if isinstance(out, tuple) else out))
    module.get_submodule(first).register_forward_pre_hook(lambda _, arguments: seen.insert(0, arguments[0]))
    model(input_ids=ids, use_cache=False)
    x, out = (each.reshape(-1, each.shape[-1]).numpy() for each in seen)
    return out, x


def test_without_samples_every_layer_looks_for_itself(
    short: Short, tmp_path: Path, searched: dict[str, tuple[list[float], int]]
) -> None:
    manifest = short(tmp_path / "out", method="rtn", transforms=[{"name": "awq", "samples": 0}]).manifest
    assert not searched and not any("around" in record or record["note"] for record in manifest["layers"])
