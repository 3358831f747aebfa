# SPDX-License-Identifier: Apache-2.0
"""What quantizes in ``bench/quantizers.py``: a function a package, run in a process of its own in that package's
environment, where fewbit need not be.

Each takes a :class:`Job`, imports what it needs, and returns what is then timed: from the model's folder and a text
to quantized layers in memory. That gives weights by layer, dequantized, (out, in), and the bits that are stored for all
of them. Scales, minima and codebooks count as float16, in which a float16 model stores them, whatever they are here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 32
"""Of the widths of stories15m, 288 and 768, a divisor: several packages leave out layers where theirs is none."""


@dataclass(frozen=True)
class Job:
    """``model``: a Hugging Face folder. ``tokens``: (windows, tokens) to calibrate on, drawn from the file ``text``.
    ``what``: a setting that the side understands. ``iters``: of tunings, ``device``: where they run."""

    model: Path
    text: Path | None
    tokens: Tensor
    bits: int
    what: str
    iters: int
    device: str


Found = tuple[dict[str, Tensor], float]
"""Weights by layer, and their bits."""
Timed = Callable[[], Any]
Read = Callable[[Any], Found]

LOADED: list[float] = []
"""Processor seconds of each loading since the job began."""


def network(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    before = used()
    made = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    LOADED.append(used() - before)
    return made


def linears(model: Any) -> dict[str, Any]:
    """Layers that are quantized, by name: all but the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def weights(model: Any) -> dict[str, Tensor]:
    return {name: layer.weight.detach().float() for name, layer in linears(model).items()}


def count(found: dict[str, Tensor]) -> int:
    return sum(weight.numel() for weight in found.values() if weight.ndim == 2)


def asymmetric(model: Any, bits: int) -> Found:
    """Dequantized weights that lie in ``model``, a scale and an integer zero point a group."""
    found = weights(model)
    return found, (bits + (16 + bits) / GROUP) * count(found)


def rows_of(job: Job) -> list[dict[str, list[int]]]:
    """Windows to calibrate on: those that fewbit draws, so that they are the same. Whoever uses a package begins with a
    text, as fewbit does here: a tokenizer is opened and reads the text in the time that is taken."""
    if job.text is not None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(job.model)(job.text.read_text())
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.tokens.tolist()]


def fewbit(job: Job) -> tuple[Timed, Read]:
    import accuracy
    import fewbit.kernels.ops
    import fewbit.model.folder
    from fewbit.containers import manifest as M
    from fewbit.containers.files import read_json
    from fewbit.recipe import Recipe
    from fewbit.run.verify import read_back, read_rewrite

    format, _, row = job.what.partition(" ")
    keywords = accuracy.settings(row, {"iters": job.iters}, {})
    if not (rule := Recipe.simple(format, head="float", **keywords).rules[-1]).calibrated:
        return fewbit_in_memory(job, rule)
    folder = TemporaryDirectory()
    out = Path(folder.name) / "out"

    def run() -> Any:
        drawn = {"calibration": job.text, "samples": len(job.tokens), "context": job.tokens.shape[1]}
        where = {"out": out, "force": True, "threads": 1, "device": job.device}
        fewbit.quantize(job.model, format, head="float", **where, **drawn, **keywords)
        return folder

    def read(_: Any) -> Found:
        records = [record for record in M.read(out)["layers"] if record["kind"] not in ("embedding", "head")]
        where = read_json(out / "model.safetensors.index.json")["weight_map"]
        found = {}
        for record in records:
            path = out / next(file for key, file in where.items() if key.startswith(f"{record['name']}.weight_"))
            values = read_back(path, record).dequantize()
            name, rewrite = record["name"], read_rewrite(path, record)
            if record["activation"] is not None:  # rounded behind the rewrite
                found[f"{name}.input"] = rewrite.apply(torch.ones(1, record["shape"][1])).flatten()
            else:
                values = rewrite.unweight(values)
            found[name] = values.reshape(record["shape"])
        return found, 8.0 * sum(record["nbytes"] for record in records)

    return run, read


def fewbit_in_memory(job: Job, rule: Any) -> tuple[Timed, Read]:
    """What needs no data, as other packages do it: layers of the loaded model replaced, and no file."""
    import fewbit.network
    from fewbit.recipe import Recipe, Rule

    recipe = Recipe((Rule("lm_head", "float"), replace(rule, match="kind:linear")))

    def run() -> Any:
        return fewbit.network.quantize(network(job), recipe, inplace=True)

    def read(made: Any) -> Found:
        layers = {record["name"]: made.network.get_submodule(record["name"]) for record in made.layers}
        found = {name: layer.weight_of().dequantize() for name, layer in layers.items()}
        return found, 8.0 * sum(record["nbytes"] for record in made.layers)

    return run, read


def llmcompressor(job: Job) -> tuple[Timed, Read]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    grid = {"num_bits": job.bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": grid}}
    if job.what == "awq":
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    elif job.what == "smooth":
        before = SmoothQuantModifier(smoothing_strength=0.5)
        recipe = [before, QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    else:
        grid["actorder"] = job.what or None
        recipe = [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    IntermediatesCache.pin_memory = lambda *arguments: None  # it needs a GPU

    def run() -> Any:
        model, data = network(job), DataLoader([{n: torch.tensor(v) for n, v in row.items()} for row in rows_of(job)])
        windows = {"max_seq_length": job.tokens.shape[1], "num_calibration_samples": len(job.tokens)}
        oneshot(model=model, dataset=data, recipe=recipe, **windows)
        found = scaled(model, job) if job.what in ("awq", "smooth") else asymmetric(model, job.bits)
        # what saving leaves of the layers is packed
        with TemporaryDirectory() as out:
            model.save_pretrained(out, save_compressed=True)
        return found

    return run, lambda found: found


def scaled(model: Any, job: Job) -> Found:
    """What llm-compressor's ``model`` computes with, whose layers are rounded when they run; norms took scales up."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    layers = linears(model).items()
    parameters = {n: (m.weight, m.weight_scale, m.weight_zero_point, m.quantization_scheme.weights) for n, m in layers}
    found = {name: fake_quantize(*each).detach().float() for name, each in parameters.items()}
    norms = {n: m.weight.detach().float() for n, m in model.named_modules() if "norm" in n and hasattr(m, "weight")}
    if job.what == "awq":
        return found | norms, (job.bits + (16 + job.bits) / GROUP) * count(found)
    inputs = {f"{name}.input": torch.ones(weight.shape[1]) for name, weight in found.items()}
    return found | norms | inputs, 8 * count(found) + 16 * sum(len(weight) for weight in found.values())


def coremltools(job: Job) -> tuple[Timed, Read]:
    """``what``: how many rows share a table; all of them where it is empty."""
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    table = {"n_bits": job.bits, "granularity": "per_tensor"}
    if job.what:
        table |= {"granularity": "per_grouped_channel", "group_size": int(job.what)}
    config = {"module_type_configs": {nn.Linear: table}, "module_name_configs": {"lm_head": None}}

    def run() -> Any:
        made = PostTrainingPalettizer(network(job), PostTrainingPalettizerConfig.from_dict(config))
        return made.compress(inplace=True)

    def read(model: Any) -> Found:
        found = weights(model)
        if any(len(weight[:16].unique()) > 2**job.bits for weight in found.values()):
            raise ValueError("some layers are as they were")
        tables = sum(len(weight) // int(job.what or len(weight)) for weight in found.values())
        return found, job.bits * count(found) + 16 * 2**job.bits * tables

    return run, read


VPTQ: dict[str, dict[str, Any]] = {
    "vptq": {"num_centroids": [-1, 256], "num_res_centroids": [-1, -1]},
    "vptq rows": {"num_centroids": [-1, 256], "num_res_centroids": [-1, -1], "enable_norm": True, "norm_dim": 1},
    "vptq two books": {"num_centroids": [-1, 32], "num_res_centroids": [-1, 16]},
}
"""What gptqmodel's is given, by setting."""


def gptqmodel(job: Job) -> tuple[Timed, Read]:
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import VPTQConfig

    if vectors := job.what in VPTQ:
        config = VPTQConfig(vector_lens=[-1, 4], **VPTQ[job.what])
    else:
        act = {"desc_act": True, "static_groups": True, "act_group_aware": False} if job.what == "desc_act" else {}
        more = {"sym": False, "format": "gptq_v2", "offload_to_disk": False, **act}
        config = QuantizeConfig(bits=job.bits, group_size=GROUP, **more)

    def run() -> Any:
        model = GPTQModel.load(str(job.model), config, device="cpu")
        model.quantize(rows_of(job), batch_size=1)
        return model.model

    def read(model: Any) -> Found:
        own = "centroids" if vectors else "dequantize_weight"  # the model has a method `dequantize`, too
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, own)}
        made = {name: layer.dequantize() if vectors else layer.dequantize_weight().T for name, layer in layers.items()}
        kept = [value for layer in layers.values() for value in layer.state_dict().values()]
        bits = 8.0 * sum((value.half() if value.is_floating_point() else value).nbytes for value in kept)
        return {name: weight.float().contiguous() for name, weight in made.items()}, bits

    return run, read


def autoround(job: Job) -> tuple[Timed, Read]:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    rows = [{name: torch.tensor([values]) for name, values in row.items()} for row in rows_of(job)]
    options = {"iters": job.iters, "nsamples": len(rows), "seqlen": job.tokens.shape[1], "batch_size": 8}
    symmetric = job.bits == 8  # it refuses zero points there

    def run() -> Any:
        words = AutoTokenizer.from_pretrained(job.model)
        grid = {"bits": job.bits, "group_size": GROUP, "sym": symmetric}
        return AutoRound(network(job), words, dataset=rows, device_map=job.device, **grid, **options).quantize()[0]

    def read(model: Any) -> Found:
        found, bits = asymmetric(model, job.bits)
        return found, bits - symmetric * job.bits / GROUP * count(found)

    return run, read


def hqq(job: Job) -> tuple[Timed, Read]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=job.bits, group_size=64, axis=1)
    options = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": False}

    def run() -> Any:
        return {name: HQQLinear(layer, config, **options) for name, layer in linears(network(job)).items()}

    def read(layers: Any) -> Found:
        found = {name: layer.dequantize().float() for name, layer in layers.items()}
        packed = sum(layer.W_q.nbytes for layer in layers.values())
        return found, 8 * packed + 32 / 64 * count(found)

    return run, read


def quanto(job: Job) -> tuple[Timed, Read]:
    import optimum.quanto as Q

    def run() -> Any:
        model = network(job)
        Q.quantize(model, weights=getattr(Q, f"qint{job.bits}"), exclude="lm_head")
        Q.freeze(model)
        return model

    return run, lambda model: of_quanto(linears(model), job.bits)


def of_quanto(layers: dict[str, Any], bits: int) -> Found:
    beside = sum(m.weight._scale.numel() + (m.weight._shift.numel() if bits < 8 else 0) for m in layers.values())
    found = {name: layer.weight.dequantize().float() for name, layer in layers.items()}
    return found, bits * sum(weight.numel() for weight in found.values()) + 16 * beside


def torchao(job: Job) -> tuple[Timed, Read]:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    config = IntxWeightOnlyConfig(getattr(torch, f"int{job.bits}"), PerGroup(GROUP), MappingType.ASYMMETRIC)

    def run() -> Any:
        model = network(job)
        quantize_(model, config, lambda layer, name: isinstance(layer, nn.Linear) and name != "lm_head")
        return model

    def read(model: Any) -> Found:
        found = {name: layer.weight.dequantize().float() for name, layer in linears(model).items()}
        return found, (job.bits + (16 + job.bits) / GROUP) * count(found)

    return run, read


def bitsandbytes(job: Job) -> tuple[Timed, Read]:
    from bitsandbytes import functional

    def run() -> Any:
        options = {"blocksize": 64, "compress_statistics": True, "quant_type": job.what}
        found = weights(network(job)).items()  # rows that no whole blocks make are decoded wrongly on the CPU
        return {name: (w.shape, functional.quantize_4bit(w.reshape(-1, 64), **options)) for name, w in found}

    def read(made: Any) -> Found:
        found = {n: functional.dequantize_4bit(*each).float().reshape(shape) for n, (shape, each) in made.items()}
        bits = sum(packed.nbytes + s.absmax.nbytes + s.state2.absmax.nbytes for _, (packed, s) in made.values())
        return found, 8.0 * bits

    return run, read


ALL = (fewbit, llmcompressor, gptqmodel, autoround, hqq, quanto, torchao, bitsandbytes, coremltools)
SIDES: dict[str, Callable[[Job], tuple[Timed, Read]]] = {one.__name__: one for one in ALL}


def peak() -> int:
    """Most bytes that this process held since that was last forgotten."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def used() -> float:
    """Processor seconds of this process and those that it started."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def main() -> None:
    """Every job in turn, so that packages are imported once: the first leaves ``0.json`` and ``0.safetensors``."""
    parser = argparse.ArgumentParser(description="one side of bench/quantizers.py")
    parser.add_argument("side", choices=sorted(SIDES))
    for name in ("model", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--iters", type=int, required=True)
    parser.add_argument("--device", required=True)
    told = parser.parse_args()
    torch.set_num_threads(1)
    for module in ("auto.modeling_auto", "auto.tokenization_auto", "llama.modeling_llama", "llama.tokenization_llama"):
        importlib.import_module(f"transformers.models.{module}")
    tokens = load_file(told.folder / "tokens.safetensors")["calibration"]
    for number, (bits, what) in enumerate(json.loads((told.folder / "jobs.json").read_text())):
        try:
            found, row = quantized(told.side, Job(told.model, told.text, tokens, bits, what, told.iters, told.device))
            save_file(found, told.folder / f"{number}.safetensors")
        except Exception as error:  # the rest of the table stands without this row
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {error}"}
        (told.folder / f"{number}.json").write_text(json.dumps(row))


def quantized(side: str, job: Job) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and what they took."""
    solve, read = SIDES[side](job)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    LOADED.clear()
    began, before = time.monotonic(), used()
    made = solve()
    spent = {"seconds": time.monotonic() - began, "cpu_seconds": used() - before, "peak_rss_bytes": peak()}
    spent["loading_cpu_seconds"] = sum(LOADED) if LOADED else None  # some packages load by themselves
    with torch.no_grad():
        found, bits = read(made)
    return {name: weight.contiguous() for name, weight in found.items()}, {**spent, "bits": bits / count(found)}


if __name__ == "__main__":
    main()
