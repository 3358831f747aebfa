# SPDX-License-Identifier: Apache-2.0
"""Facts kept on disk: what they hold, that runs use them and nothing else, and whose they must be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import calibrate
from fewbit.containers.safetensors import open_safetensors
from fewbit.core.facts import Facts
from fewbit.core.observers import Seen
from fewbit.errors import CorruptFileError, InputError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.run.collecting import merge
from fewbit.run.events import Event
from fewbit.run.facts import KeptFacts

FEW: dict[str, Any] = {"samples": 6, "context": 32, "calibration_dtype": "float32"}


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> KeptFacts:
    """Everything, of a few windows of the bundled text."""
    return fewbit.collect(tiny, out=tmp_path_factory.mktemp("facts") / "facts", **FEW)


def same(one: Facts, other: Facts) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("total", "total_square", "largest", "gram")]
    return one.tokens == other.tokens and all(torch.equal(a, b) for a, b in pairs)


def alike(one: Seen, other: Seen) -> bool:
    places = (one.exponent, one.first, one.batches) == (other.exponent, other.first, other.batches)
    return places and torch.equal(one.counts, other.counts)


def test_sums_are_of_what_every_layer_sees_in_the_float_model(tiny: Path, kept: KeptFacts) -> None:
    model = StreamedModel.open(open_checkpoint(tiny))
    model.load("")
    ids = calibrate.calibration(open_checkpoint(tiny).tokenizer(), None, 6, 32, 0).ids
    assert kept.described["calibration"]["sha256"] == calibrate.Calibration("", ids).sha256
    expected: dict[str, Facts] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for window in ids.split(1):
            inputs = model.begin(window)
            hidden = inputs.hidden
            for block in range(len(model.blocks)):

                def note(site: str, x: torch.Tensor, expert: int | None) -> None:
                    found = Facts.of(x, gram=True, ranges=True)
                    expected[site] = expected[site].merge(found) if site in expected else found

                with model.observe(block, note):
                    hidden = model.run_block(block, hidden, inputs)
    torch.set_num_threads(before)
    assert len(expected) == 14
    for site in model.sites:
        found = kept.of(site)
        if site.block is None:
            assert found is None and kept.fisher(site) is None
        else:
            assert found is not None and same(found[0], expected[site.name])
            seen = expected[site.name].ranges
            assert seen is not None and alike(kept.ranges(site), seen)
    names = open_safetensors(kept.path / "inputs-00000.safetensors").entries
    for array in (".gram", ".range_counts", ".range_ends"):
        assert len([name for name in names if name.endswith(array)]) == 4  # q, k, v share theirs, and gate, up


def test_a_run_with_facts_gives_the_bytes_of_one_that_collects_them_itself(
    tiny: Path, kept: KeptFacts, tmp_path: Path
) -> None:
    """Sensitive k-means looks at the float model alone, so that both are the same."""
    for name, more in (("alone", {}), ("facts", {"facts": kept.path})):
        result = fewbit.quantize(tiny, "palette3/rows16", method="squeezellm", out=tmp_path / name, **FEW, **more)
    assert result.manifest["calibration"]["facts"] == kept.sha256
    shards = sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors"))
    assert len(shards) == 4
    for name in shards:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "facts" / name).read_bytes()
    assert {layer["tokens"] for layer in result.manifest["layers"] if layer["block"] is not None} == {6 * 32}


def test_layers_are_solved_on_the_facts_of_the_float_model(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    model = StreamedModel.open(open_checkpoint(tiny))
    model.load("")
    told: list[Event] = []
    more = {**FEW, "context": 1 << 20, "progress": told.append}  # of a text that nobody reads
    result = fewbit.quantize(tiny, "int3/g32/asym", method="gptq", out=tmp_path / "out", facts=kept.path, **more)
    assert not [event.message for event in told if "calibra" in (event.message or "")]
    quantized = fewbit.load(tmp_path / "out")
    for layer in result.manifest["layers"]:
        if layer["block"] is None:
            continue
        site = model.site(layer["name"])
        known = kept.of(site)
        assert known is not None
        format = fewbit.formats.parse("int3/g32/asym")
        expected = fewbit.methods.gptq(model.weight(site.name).float(), format, known[0])
        found = quantized.get_submodule(site.name).qtensor()
        assert torch.equal(found.dequantize(), expected.dequantize())


def test_facts_of_another_model_or_text_or_too_few_are_refused(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    def refused(match: str, model: Path, facts: Path, method: str = "skm", **more: Any) -> None:
        with pytest.raises(InputError, match=match):
            fewbit.quantize(model, "palette4", method=method, out=tmp_path / "out", facts=facts, **{**FEW, **more})
        assert not (tmp_path / "out").exists()

    other, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (other / "model.safetensors").write_bytes(bytes(content))
    text.write_text("Another text than the bundled one. " * 40)
    refused("the hash of their model's weights is", other, kept.path)
    refused("the hash of their text's tokens is", tiny, kept.path, calibration=text)
    refused("holds no facts.json", tiny, tiny)
    some = fewbit.collect(tiny, out=tmp_path / "some", **FEW, gram=False, fisher=False, ranges=False)
    assert some.described["collected"] == ["mean_square"]
    assert sorted(path.name for path in some.path.iterdir()) == [
        "facts.json",
        "inputs-00000.safetensors",
        "inputs-00001.safetensors",
    ]
    refused("fisher of .*q_proj.*was not collected.*--no-fisher", tiny, some.path)
    refused("gram of .*q_proj.*was not collected", tiny, some.path, method="gptq")
    damaged = tmp_path / "damaged"
    shutil.copytree(kept.path, damaged)
    content = bytearray((damaged / "fisher-00001.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "fisher-00001.safetensors").write_bytes(bytes(content))
    with pytest.raises(CorruptFileError, match="fisher-00001"):
        KeptFacts.read(damaged)


def test_facts_of_two_texts_add_up(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    more = fewbit.collect(tiny, out=tmp_path / "more", **FEW, seed=7, fisher=False)
    both = merge([kept.path, more.path], out=tmp_path / "both")
    assert both.described["collected"] == ["mean_square", "gram", "ranges"]
    assert both.described["calibration"]["tokens"] == 2 * 6 * 32
    twice = merge([kept.path, kept.path], out=tmp_path / "twice")
    for site in StreamedModel.open(open_checkpoint(tiny)).sites:
        if site.block is None:
            continue
        one, two, total = kept.of(site), more.of(site), both.of(site)
        assert one is not None and two is not None and total is not None
        assert same(total[0], one[0].merge(two[0])) and not same(one[0], two[0])
        found, alone = twice.fisher(site), kept.fisher(site)
        assert found is not None and alone is not None and torch.equal(found[0], 2 * alone[0])
        outputs, once = twice.output_square(site), kept.output_square(site)
        assert outputs is not None and once is not None and torch.equal(outputs[0], 2 * once[0])
        assert both.output_square(site) is None
        assert alike(both.ranges(site), kept.ranges(site).merge(more.ranges(site)))
        assert not alike(kept.ranges(site), more.ranges(site))
    with pytest.raises(InputError, match="two or more"):
        merge([kept.path], out=tmp_path / "one")


class Stop(Exception):
    pass


def test_stopped_and_continued_the_bytes_are_the_same(
    tiny: Path, kept: KeptFacts, hashes: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.message == "sensitivity of block 2 of 2":
            raise Stop

    out = tmp_path / "facts"
    with pytest.raises(Stop):
        fewbit.collect(tiny, out=out, **FEW, threads=3, progress=interrupt)
    assert not out.exists()
    fewbit.collect(tiny, out=out, **FEW, threads=1)
    assert hashes(out) == hashes(kept.path)
    assert [path.name for path in tmp_path.iterdir()] == ["facts"]
    fewbit.collect(tiny, out=out, **FEW)  # finished already
    with pytest.raises(InputError, match="exists already"):
        fewbit.collect(tiny, out=out, **FEW, seed=1)
