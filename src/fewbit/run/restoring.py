# SPDX-License-Identifier: Apache-2.0
"""Restorative preprocessing (PTQ1.61, Zhao et al. 2025, arXiv:2502.13179): a float model made easier to quantize.

A model is quantized once. Beside each quantized layer of its blocks, W_hat, a product of low rank is learned on text,
all else standing still, and goes to the float weight in the end::

    y = W_hat x + (alpha / rank) B A drop(x),        W <- W + (alpha / rank) B A

What quantizing breaks in such weights the product has learned to make up for; they are then quantized again from the
start. It is training: what it brings depends on the text, and the paper's figures are of 20000 steps. Where we depart
from the authors' code: every quantized layer of a block has a product, the last of attention too; the mask of salient
columns is found again from the inputs of the new weights.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbit import calibrate
from fewbit.containers import manifest as M
from fewbit.containers.files import refuse_folder, take_place
from fewbit.core import given
from fewbit.core.defaults import exact
from fewbit.errors import SpecError, UnsupportedError
from fewbit.model.checkpoint import Checkpoint, open_checkpoint
from fewbit.model.hooks import hooked
from fewbit.model.stream import StreamedModel
from fewbit.run.decoding import decode_into
from fewbit.run.events import Event, Progress
from fewbit.run.opening import silent


@exact()
def restore(
    model: str | Path,
    quantized: str | Path,
    *,
    text: str | Path | None = None,
    rank: int = 64,
    alpha: float = 16.0,
    dropout: float = 0.1,
    steps: int = 200,
    batch: int = 4,
    lr: float = 1e-4,
    samples: int = 128,
    context: int = 256,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Any:
    """A float model of transformers whose weights make up for what quantizing ``model`` to ``quantized`` lost.

    ``fewbit.quantize`` takes it, with its tokenizer, or the folder ``out``, in place of ``model``. It needs the memory
    of the float32 model twice, and the activations of a batch.

    Args:
        model: the float model: a folder, a GGUF file, or a hub id.
        quantized: the folder that quantizing it wrote.
        text: to learn on; the bundled text where it is None. ``samples`` windows of ``context`` tokens are drawn.
        rank, alpha, dropout: of the products.
        steps, batch, lr: of AdamW, on windows in turn; the rate falls to zero by half a cosine.
        out: a folder to write the model and its tokenizer to; ``force`` replaces it.
        progress: hears of every step, and of the mean loss now and then.

    Raises:
        SpecError: a number is out of range. InputError: ``out`` exists and ``force`` is off. UnsupportedError: inputs
            of layers are rounded, or nothing is quantized.
    """
    if min(rank, steps, batch) < 1 or not 0 <= dropout < 1 or not 0 < lr <= 1:
        found = f"rank={rank}, steps={steps}, batch={batch}, dropout={dropout}, lr={lr}"
        raise SpecError("restoring a model", found, "64, 200, 4, 0.1 and 1e-4 are usual")
    checkpoint, folder = open_checkpoint(model), given.place("the quantized folder", quantized)
    target = None if out is None else given.place("out", out)
    if target is not None:
        refuse_folder(target, force, "config.json", checkpoint.path, folder)
    words = calibrate.calibration(checkpoint.words(), text, samples, context, seed)
    streamed = StreamedModel.open(checkpoint)
    streamed.load("")
    originals, names = _decoded(streamed, folder)
    with _adapted(streamed, names, rank, alpha / rank, dropout, seed) as pairs:
        _train(streamed.module, pairs, words.ids, steps, batch, lr, seed, progress or silent)
    for name, weight in originals.items():
        streamed.set_weight(name, weight)
    for name, (down, up) in zip(names, pairs, strict=True):
        streamed.set_weight(name, originals[name] + (alpha / rank) * (up @ down).detach())
    if target is not None:
        _write(streamed.module, checkpoint, target)
    return streamed.module.eval()


def _decoded(streamed: StreamedModel, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Put what ``folder`` holds into the loaded model; the float weights that were there, and the layers of blocks."""
    layers = [record for record in M.read(folder)["layers"] if record["experts"] == 1]
    originals = {record["name"]: streamed.weight(record["name"]).clone() for record in layers}
    for record in layers:
        if record["activation"] is not None:
            found = f"inputs of {record['name']} are rounded to {record['activation']}"
            raise UnsupportedError(f"restoring from {folder}", found, "quantize weights alone")
    decode_into(streamed, folder, layers)
    names = [record["name"] for record in layers if record["block"] is not None]
    if not names:
        raise UnsupportedError(f"restoring from {folder}", "no layer of a block is quantized in it", "another folder")
    return originals, names


def _write(module: Any, checkpoint: Checkpoint, out: Path) -> None:
    """A folder of the name that it will have, once all of it is there."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    module.save_pretrained(partial)
    checkpoint.save_sidecars(partial)
    take_place(partial, out)


@contextmanager
def _adapted(
    streamed: StreamedModel, names: list[str], rank: int, scale: float, dropout: float, seed: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A (rank, columns) and B (rows, rank) of every layer, added to it as the module says; B begins with zeros."""
    generator, pairs = torch.Generator().manual_seed(seed), []

    def adapted(name: str) -> RemovableHandle:
        rows, columns = streamed.weight(name).shape
        down = torch.randn(rank, columns, generator=generator).div_(columns**0.5).requires_grad_()
        up = torch.zeros(rows, rank, requires_grad=True)

        def add(_: nn.Module, inputs: tuple[Any, ...], y: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            x = nn.functional.dropout(inputs[0], dropout, training=True)
            return y + scale * (x @ down.T) @ up.T

        pairs.append((down, up))
        return streamed.module.get_submodule(name).register_forward_hook(add)  # type: ignore[no-any-return]

    with hooked(map(adapted, names)):
        yield pairs


def _train(
    module: nn.Module,
    pairs: list[tuple[Tensor, Tensor]],
    ids: Tensor,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: Progress,
) -> None:
    """Learn ``pairs`` to foretell the next token of windows ``ids`` (windows, tokens)."""
    module.requires_grad_(False)
    learned = [tensor for pair in pairs for tensor in pair]
    descent = torch.optim.AdamW(learned, lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    recent: list[float] = []
    began = time.monotonic()
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(seed)  # of what is dropped
        for step in range(steps):
            while len(order) < batch:
                order += torch.randperm(len(ids), generator=generator).tolist()
            drawn, order = ids[order[:batch]], order[batch:]
            descent.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            logits = module(input_ids=drawn, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, 1:].flatten())
            descent.zero_grad()
            loss.backward()
            descent.step()
            recent.append(float(loss.detach()))
            told = ""
            if (step + 1) % max(1, steps // 10) == 0:
                told = f"step {step + 1} of {steps}, loss {sum(recent) / len(recent):.4f}"
                recent = []
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1)
            progress(Event("step", block=step + 1, blocks=steps, eta_seconds=left, message=told))
