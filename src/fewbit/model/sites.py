# SPDX-License-Identifier: Apache-2.0
"""Sites: the matrices of a model that can be quantized, and the reason why every other parameter is kept as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fewbit.model.families import EXPERTS, ROUTERS
from fewbit.model.loading import under

Kind = Literal["linear", "conv1d", "experts", "embedding", "head", "vision", "conv2d"]

SEEING = "of the vision tower or projector"
"""Why a parameter of a vision-language model is no site: beside its text model, linear layers alone are."""


@dataclass(frozen=True)
class Site:
    """One quantizable matrix, or a stack of them.

    * ``name``: module path, or the parameter's path for fused experts. ``parameter``: the parameter's full name.
    * ``shape``: (rows, columns) of ONE matrix, rows being outputs whatever the order in memory.
    * ``experts``: number of stacked matrices, 1 unless experts are fused.
    * ``kind``: "vision" is a linear layer of what a vision-language model sees with.
    * ``block``: index of the block that holds it, None outside of blocks.
    * ``tied_to``: name of the site whose parameter this one shares.
    * ``transposed``: the parameter lies in memory as (columns, rows): GPT-2's Conv1D and some fused experts.
    """

    name: str
    kind: Kind
    parameter: str
    shape: tuple[int, int]
    experts: int
    block: int | None
    tied_to: str | None
    transposed: bool = False

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1] * self.experts


def find(
    model: PreTrainedModel, blocks: Sequence[str], tied: dict[str, str]
) -> tuple[list[Site], list[tuple[str, str]]]:
    """Sites in the model's order, and every other parameter as (name, reason).

    ``tied`` maps a parameter to the one that it shares. Together both lists name each parameter exactly once.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    text = blocks[0].rsplit(".", 2)[0]
    sites: list[Site] = []
    kept: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        block = next((i for i, name in enumerate(blocks) if path.startswith(name + ".")), None)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if module is head or under(path, text):
                kind = _kind(path, module, leaf, parameter, block, embedding, head)
            else:
                # Subclasses of linear layers may be run by whatever holds them, as attention of torch's own does.
                kind = "vision" if type(module) is nn.Linear and leaf == "weight" else SEEING
            if kind in get_args(Kind):
                transposed = kind == "conv1d" or (kind == "experts" and bool(getattr(module, "is_transposed", False)))
                shape = tuple(parameter.shape[-2:])
                sites.append(
                    Site(
                        name if kind == "experts" else path,
                        kind,  # type: ignore[arg-type]
                        name,
                        (shape[1], shape[0]) if transposed else (shape[0], shape[1]),
                        parameter.shape[0] if kind == "experts" else 1,
                        block,
                        tied[name].removesuffix(".weight") if name in tied else None,
                        transposed,
                    )
                )
            else:
                kept.append((name, kind))
    return sites, kept


def _kind(
    path: str,
    module: nn.Module,
    leaf: str,
    parameter: nn.Parameter,
    block: int | None,
    embedding: nn.Module,
    head: nn.Module | None,
) -> str:
    """A :data:`Kind`, or the reason why this parameter is no site."""
    own = path.rpartition(".")[2]
    if leaf.endswith("bias"):
        return "a bias"
    if module is head and leaf == "weight":
        return "head"
    if module is embedding and leaf == "weight":
        return "embedding"
    if "norm" in type(module).__name__.lower() or "norm" in own.lower():
        return "a norm"
    if own in ROUTERS or "router" in type(module).__name__.lower():
        return "a router: its error would change which experts run"
    if isinstance(module, nn.Embedding):
        return "an embedding of something other than tokens (positions, layers)"
    if parameter.ndim == 1:
        return "a vector"
    if block is None:
        return "outside of the blocks"
    if isinstance(module, Conv1D) and leaf == "weight":
        return "conv1d"
    if isinstance(module, nn.Linear) and leaf == "weight":
        return "linear"
    if parameter.ndim == 3 and leaf in EXPERTS:
        return "experts"
    return f"a parameter of {type(module).__name__}, which is neither a linear layer nor stacked experts"


def in_block(sites: Sequence[Site], block: int) -> Iterator[Site]:
    """The sites of one block."""
    return (site for site in sites if site.block == block)
