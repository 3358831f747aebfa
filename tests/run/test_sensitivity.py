# SPDX-License-Identifier: Apache-2.0
"""The Fisher diagonal, block by block, against autograd through the whole model in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.run import sensitivity
from fewbit.run.hidden import HiddenFile
from fewbit.run.sensitivity import Sensitivity
from fewbit.run.workers import workers


def windows(vocabulary: int, sequences: int = 5, tokens: int = 24) -> Tensor:
    return torch.randint(3, vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(3))


def collected(source: Path, folder: Path, threads: int = 2) -> Sensitivity:
    """A pass over all sites, done."""
    model = StreamedModel.open(open_checkpoint(source))
    wanted = frozenset(site.name for site in model.sites)
    with workers(threads) as pool:
        found = Sensitivity(model, windows(model.config.vocab_size), folder, wanted, pool, lambda event: None)
        found.collect()
    return found


def oracle(source: Path, outputs: Callable[[nn.Module, dict[str, Tensor]], object] | None = None) -> dict[str, Tensor]:
    """By the definition: the gradient of each sequence's own loss, squared, summed. ``outputs``: prepares the model to
    add more."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, experts_implementation="eager").eval()
    sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    if outputs is not None:
        outputs(model, sums)
    for ids in windows(model.config.vocab_size):
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
        for name, value in model.named_parameters():
            sums[name] += value.grad.square() if value.grad is not None else 0
    return sums


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "qwen2-moe"])
def test_equals_autograd_through_the_whole_model(
    tiny_family: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    source = tiny_family(family)
    found, expected = collected(source, tmp_path / "pass"), oracle(source)
    compared = 0
    for site in found.model.sites:
        parts = found.fisher(site)
        if site.block is None:
            assert parts is None
            continue
        assert parts is not None and len(parts) == site.experts
        exact = expected[site.parameter]
        exact = (exact.transpose(-1, -2) if site.transposed else exact).reshape(site.experts, *site.shape)
        for part, whole in zip(parts, exact, strict=True):
            # Squares of float32 gradients, which are sums over all tokens and layers behind: relative to the largest.
            assert float((part.double() - whole).abs().max()) <= 2e-5 * float(exact.max())
            compared += 1
        assert float(exact.max()) > 0
    assert compared >= 8
    assert [path.name for path in sorted((tmp_path / "pass").iterdir())] == [
        f"fisher-{block:05d}.safetensors" for block in range(len(found.model.blocks))
    ]


def at_outputs(model: nn.Module, sums: dict[str, Tensor]) -> None:
    """Let the backward pass of ``model`` add up squared gradients at the outputs of each module, under its name."""

    def watched(name: str, module: nn.Module) -> None:
        def back(module: nn.Module, into: object, out: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + out[0].square().reshape(-1, out[0].shape[-1]).sum(0)

        module.register_full_backward_hook(back)

    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) and isinstance(getattr(module, "weight", None), nn.Parameter):
            watched(name, module)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_gradients_at_outputs_equal_autograd_s(tiny_family: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    source = tiny_family(family)
    found, expected = collected(source, tmp_path / "pass"), oracle(source, at_outputs)
    compared = 0
    for site in found.model.sites:
        parts = found.output_square(site)
        if site.block is None:
            assert parts is None
            continue
        assert parts is not None and len(parts) == 1 and parts[0].shape == site.shape[:1]
        assert float((parts[0].double() - expected[site.name]).abs().max()) <= 2e-5 * float(expected[site.name].max())
        compared += float(expected[site.name].max()) > 0
    assert compared == len([site for site in found.model.sites if site.block is not None]) >= 8


def test_gradients_at_outputs_of_experts_are_theirs(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    """With one token a sequence that has a loss, and one an expert sees of it, F_oi is g_o^2 x_i^2: both factors are
    known, and each expert's own."""
    source = tiny_family("qwen2-moe")
    model = StreamedModel.open(open_checkpoint(source))
    wanted = frozenset(site.name for site in model.sites if site.kind == "experts")
    ids = windows(model.config.vocab_size, 1, 2)
    with workers(1) as pool:
        made = Sensitivity(model, ids, tmp_path / "pass", wanted, pool, lambda event: None, watched="mean_square")
        made.collect()
    compared = 0
    last = len(model.blocks) - 1  # before it, attention brings the loss of the second token to the first
    for site in (site for site in model.sites if site.name in wanted and site.block == last):
        squares, fisher = made.output_square(site), made.fisher(site)
        assert squares is not None and fisher is not None and len(squares) == site.experts
        for square, f in zip(squares, fisher, strict=True):
            if bool(f.any()):
                inputs = f.double().sum(0) / square.double().sum()
                torch.testing.assert_close(torch.outer(square.double(), inputs), f.double(), rtol=1e-3, atol=0)
                compared += 1
            else:
                assert not bool(square.any())
    assert compared >= 2


class Stop(Exception):
    pass


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected(tiny, tmp_path / "whole", threads=1)
    good, written, stop = Sensitivity._created, [0], [0]

    def interrupted(self: Sensitivity, what: str, block: int) -> HiddenFile:
        if written[0] == stop[0]:
            raise Stop
        written[0] += 1
        return good(self, what, block)

    monkeypatch.setattr(Sensitivity, "_created", interrupted)
    for _ in range(6):  # what enters two blocks, and leaves them; a gradient, and those at their inputs
        with pytest.raises(Stop):
            collected(tiny, tmp_path / "parts")
        stop[0] += 1
    collected(tiny, tmp_path / "parts")
    assert written[0] == 6, "something was done twice"
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.fixture
def deep(tiny: Path, tmp_path: Path) -> Path:
    """A folder with five blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def test_with_little_disk_fewer_files_and_the_same_bytes(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, good = [0], Sensitivity._created

    def counted(self: Sensitivity, what: str, block: int) -> HiddenFile:
        most[0] = max(most[0], len(list(self.folder.glob("hidden-*.f32"))) + (what == "hidden"))
        return good(self, what, block)

    monkeypatch.setattr(Sensitivity, "_created", counted)
    collected(deep, tmp_path / "all")
    assert most == [6]
    most[0] = 0
    monkeypatch.setattr(sensitivity.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    collected(deep, tmp_path / "few")
    assert most == [4]
    for path in (tmp_path / "all").iterdir():
        assert path.read_bytes() == (tmp_path / "few" / path.name).read_bytes()


def test_one_block_is_in_memory_at_a_time(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, good = set(), StreamedModel.run_block

    def counted(self: StreamedModel, *arguments: object) -> Tensor:
        held.add(self.materialised())
        return good(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamedModel, "run_block", counted)
    found = collected(deep, tmp_path / "pass")
    block = sum(value.numel() for value in found.model.module.model.layers[0].parameters())
    assert held == {block}
    assert found.model.materialised() == 0


def test_gradients_that_are_no_numbers_are_refused_by_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = StreamedModel.logits
    monkeypatch.setattr(StreamedModel, "logits", lambda self, hidden: good(self, hidden) * float("nan"))
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj.*NaN"):
        collected(tiny, tmp_path / "pass")
