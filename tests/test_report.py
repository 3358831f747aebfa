# SPDX-License-Identifier: Apache-2.0
"""What reports say: the rows, the verdict, the terminal tables and the model card."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fewbit.report import numbers
from fewbit.report.card import card, licence_of
from fewbit.report.rows import closeness, comparable, procedure, rows, verdict
from fewbit.report.table import evaluation_table
from fewbit.report.write import write_comparison, write_reports

HOSTILE = '</svg><script>alert(1)</script>"onmouseover="alert(2)" | `x` [y](z) model.layers.3.evil_proj'
QUANTILES = {"0.5": 0.02, "0.9": 0.2, "0.99": 0.6, "0.999": 1.5, "1.0": 4.0}


def evaluation(name: str = "out", kl: float = 0.04, decode: float = 32.0, **more: Any) -> dict[str, Any]:
    """An ``Evaluation.to_json()`` with plausible figures."""
    original = {
        "model": "/models/original", "perplexity": 22.3, "perplexity_stderr": 0.5, "bits_per_weight": 16.0,
        "size_bytes": 269_000_000, "parameters": 134_000_000, "prefill_tokens_per_s": 800.0,
        "decode_tokens_per_s": 24.0, "peak_rss_bytes": 1_240_000_000, "kl_mean": 0.0, "kl_mean_stderr": 0.0,
        "kl_p999": 0.0, "kl_quantiles": dict.fromkeys(QUANTILES, 0.0), "top1_agreement": 1.0,
        "top1_agreement_stderr": 0.0, "perplexity_ratio": 1.0, "perplexity_ratio_stderr": 0.0, "linear_share": 0.7,
        "energy_joules_per_token": "not measurable here: there is no RAPL interface", "load_seconds": 2.0,
        "dtype": "float32", "kernels": {},
        "runs": {"prefill_tokens_per_s": [790.0, 800.0, 810.0], "decode_tokens_per_s": [23.9, 24.0, 24.2]},
    }  # fmt: skip
    return {
        **copy.deepcopy(original), "model": f"/results/{name}", "perplexity": 24.3, "perplexity_stderr": 0.6,
        "bits_per_weight": 4.25, "size_bytes": 90_000_000, "decode_tokens_per_s": decode,
        "peak_rss_bytes": 700_000_000, "kl_mean": kl, "kl_mean_stderr": kl / 50, "kl_p999": 1.5,
        "kl_quantiles": QUANTILES, "top1_agreement": 0.87, "perplexity_ratio": 1.09, "perplexity_ratio_stderr": 0.006,
        "runs": {"prefill_tokens_per_s": [795.0, 800.0, 805.0], "decode_tokens_per_s": [decode * 0.99, decode]},
        "reference": original,
        "protocol": {"text": "held-out text", "tokens_sha256": "77" * 32, "context": 2048, "windows": 22,
                     "tokens_scored": 45034, "unscored_per_window": 1, "bos": False, "perplexity": "exp of the mean",
                     "stderr": "clustered by window", "kl": "KL(reference || model)", "speed": "greedy",
                     "peak_rss": "largest resident set", "notes": ["a note"]},
        "environment": {"fewbit": "0.1.0", "torch": "2.13", "transformers": "5.23", "python": "3.11",
                        "system": "Linux", "cpu": "EPYC", "isa": "AVX512", "cores": 2, "threads": 2, "time": "now"},
        **more,
    }  # fmt: skip


def manifest(blocks: int = 4, name: str = HOSTILE) -> dict[str, Any]:
    """A ``fewbit.json`` whose layer 2 is the worst, and one layer with a hostile name and note."""
    layers = [
        {"name": f"model.layers.{block}.{part}", "block": block, "kind": "linear", "format": "int4/g64/sym",
         "layout": "dense", "method": "gptq", "kernel": "affine_w4_avx512", "shape": [64, 128], "experts": 1,
         "nbytes": 4352, "bits_per_weight": 4.25, "relative_error": 0.3 if block == 2 else 0.01 * (block + 1),
         "tokens": 1024, "note": ""}
        for block in range(blocks) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]  # fmt: skip
    layers.append(layers[0] | {"name": name, "note": name, "method": name, "relative_error": 0.005})
    return {
        "manifest": 1, "version": "0.1.0",
        "source": {"path": "/home/me/original", "sha256": "ab" * 32, "architecture": "L"},
        "recipe": {"rule": [{"match": name, "format": "int4/g64"}]}, "seed": 0, "calibration": None,
        "size_bytes": 90_000_000, "bits_per_weight": 4.25, "layers": layers,
        "skipped": [{"name": name, "reason": name, "nbytes": 512, "parameters": 256}],
        "drift": [{"block": block, "relative_error": 0.02 * (block + 1)} for block in range(blocks)],
        "check": {"perplexity": 24.0, "reference_perplexity": 22.0, "kl_mean": 0.04, "tokens": 512},
        "files": {"model.safetensors": "ef" * 32},
    }  # fmt: skip


def printed(table: Any) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the process
    console.print(table)
    return console.export_text()


def row(evaluation: dict[str, Any], label: str) -> Any:
    return next(row for row in rows(evaluation) if row.label == label)


def test_the_table_holds_before_after_and_change() -> None:
    text = printed(evaluation_table(evaluation()))
    for wanted in ("22.30 ± 0.50", "24.30 ± 0.60", "+9.0 % ± 0.6", "269 MB", "90.0 MB", "3.0× smaller", "1.33× faster"):
        assert wanted in text


def test_slower_is_said_loudly() -> None:
    slow = evaluation(decode=12.0)
    assert row(slow, "Decode").change == "0.500×: SLOWER" and row(slow, "Decode").tone == "bad"
    assert any("Slower than the original" in warning for warning in verdict(slow).warnings)
    assert "SLOWER" in printed(evaluation_table(slow)) and "SLOWER" in card(manifest(), slow)


def test_overlapping_runs_are_no_speedup() -> None:
    same = evaluation(decode=24.1)
    assert "no difference beyond noise" in row(same, "Decode").change and row(same, "Decode").tone == "even"


def test_larger_is_said_loudly() -> None:
    assert row(evaluation(size_bytes=538_000_000), "Size on disk").change == "2.00× LARGER"


def test_a_change_within_its_error_is_no_change() -> None:
    found = row(evaluation(perplexity_ratio=1.009, perplexity_ratio_stderr=0.006), "Perplexity")
    assert "within the error" in found.change and found.tone == "even"


@pytest.mark.parametrize(("kl", "word"), [(0.0001, "practically"), (0.04, "close"), (0.5, "Damaged"), (3.0, "Broken")])
def test_the_verdict_names_the_damage(kl: float, word: str) -> None:
    assert verdict(evaluation(kl=kl)).headline.lower().startswith(word.lower())
    assert (closeness(kl)[1] == "bad") == (kl >= 0.2)


def test_what_was_done_to_a_layer_is_said_in_order() -> None:
    assert procedure({"method": "rtn"}) == "rtn" and procedure({"method": None}) is None
    steps = [{"name": "smooth", "alpha": 0.7}, "rotate"]
    assert procedure({"method": "gptq", "transforms": steps}) == "smooth(alpha=0.7) + rotate + gptq"


def test_without_a_reference_the_verdict_warns() -> None:
    keys = ("kl_mean", "kl_p999", "top1_agreement", "perplexity_ratio")
    alone = evaluation(reference=None, **dict.fromkeys(keys))
    assert any("no original" in warning for warning in verdict(alone).warnings)
    assert "KL" not in printed(evaluation_table(alone))


def test_the_slow_reference_kernel_is_named() -> None:
    assert any("reference kernel" in w for w in verdict(evaluation(kernels={"reference": 7})).warnings)


def test_energy_is_a_figure_or_says_that_it_is_none() -> None:
    assert row(evaluation(), "Energy per token").after == "not measurable here"
    measured = evaluation(energy_joules_per_token=0.5)
    measured["reference"]["energy_joules_per_token"] = 1.0
    assert row(measured, "Energy per token").change == "2.0× less"


def test_results_on_different_text_do_not_compare() -> None:
    other = evaluation()
    other["protocol"] = other["protocol"] | {"tokens_sha256": "88" * 32}
    assert comparable([evaluation(), evaluation()]) is None
    assert "different text" in str(comparable([evaluation(), other]))


def test_markup_in_names_is_text() -> None:
    assert "[bold]x" in printed(evaluation_table(evaluation(name="[bold]x")))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.00123, "0.00123"), (1e-9, "1.00e-09"), (None, "–")],
)
def test_significant(value: float | None, text: str) -> None:
    assert numbers.significant(value) == text


def test_sizes_durations_and_changes() -> None:
    assert [numbers.size(v) for v in (12, 1.5e3, 9e7, 2.69e9)] == ["12 B", "1.50 kB", "90.0 MB", "2.69 GB"]
    assert [numbers.seconds(v) for v in (0.84, 312, 7380)] == ["0.84 s", "5 min 12 s", "2 h 03 min"]
    assert [numbers.change(r) for r in (1.032, 0.99, 179.0)] == ["+3.2 %", "-1.0 %", "×179"]


def test_the_card_has_valid_front_matter_and_inherits_the_licence() -> None:
    text = card(manifest(), evaluation(), "---\nlanguage: en\nlicense: apache-2.0\n---\n# Original")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers" and "fewbit" in front["tags"]
    assert "The licence of the original applies: apache-2.0" in text and "from_pretrained" in text


def test_hostile_names_stay_text_in_the_card() -> None:
    described = manifest()
    described["layers"][-1]["relative_error"] = 0.9
    text = card(described, evaluation(), "---\nlicense: 'x\nlicense_name: \"y: [\n---\n")
    assert isinstance(yaml.safe_load(text.split("---\n")[1]), dict)
    prose = text.split("```json")[0] + text.split("```")[-1]
    assert "<script" not in prose and "</svg" not in prose
    table = [line for line in prose.splitlines() if "evil_proj" in line and line.startswith("|")]
    assert table and all(line.replace("\\|", "").count("|") == 5 for line in table)


def test_the_card_names_no_local_path() -> None:
    assert "/home/me" not in card(manifest(name="plain"), evaluation())


def test_licence_of_a_card_without_one() -> None:
    assert licence_of(None) == licence_of("# no front matter") == licence_of("---\ntags: []\n---\n") == {}
    assert "names none" in card(manifest(), None)


def test_reports_are_written_beside_the_model(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    (original / "README.md").write_text("---\nlicense: mit\n---\n")
    described = manifest()
    described["source"]["path"] = str(original)
    (tmp_path / "fewbit.json").write_text(json.dumps(described))
    written = write_reports(tmp_path, evaluation())
    assert [path.name for path in written] == ["evaluation.json", "README.md", "report.html"]
    assert json.loads(written[0].read_text()) == evaluation()
    assert 'license: "mit"' in written[1].read_text()
    assert write_comparison(tmp_path / "c.html", [evaluation(), evaluation("b")]).stat().st_size > 1000
    assert [path.name for path in write_reports(tmp_path, None)] == ["README.md", "report.html"]
