# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a decoder lie in transformers' module tree, found by :mod:`fewbit.model.families`."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from fewbit.errors import UnsupportedError
from fewbit.model.families import FAMILIES, Family
from fewbit.model.loading import under


def family_of(model: PreTrainedModel) -> tuple[Family, nn.ModuleList]:
    """The row of the table that fits ``model``, and its blocks."""
    for family in FAMILIES:
        blocks = _child(model, family.blocks)
        base = _child(model, family.blocks.rpartition(".")[0])
        if isinstance(blocks, nn.ModuleList) and len(blocks) and base is not None:
            weighted = {name for name, child in base.named_children() if any(True for _ in child.parameters())}
            if weighted <= {family.blocks.rpartition(".")[2], *family.before, *family.after}:
                return family, blocks
    raise UnsupportedError(
        f"streaming the architecture {type(model).__name__} (model type {model.config.model_type})",
        "its blocks and what surrounds them are in no row of fewbit.model.families",
        f"a decoder whose blocks are at one of {', '.join(sorted({family.blocks for family in FAMILIES}))}",
    )


def surroundings(model: PreTrainedModel, family: Family) -> tuple[list[str], list[str]]:
    """Paths that run before the blocks, and after them (the head last), of those that the model has."""
    base = family.blocks.rpartition(".")[0]
    present = dict(model.named_modules())
    before = [path for name in family.before if (path := f"{base}.{name}") in present]
    after = [path for name in family.after if (path := f"{base}.{name}") in present]
    head = model.get_output_embeddings()
    return before, after + [path for path, module in present.items() if module is head]


def beside(model: PreTrainedModel, family: Family) -> list[str]:
    """Paths beside the text model and its head: what a vision-language model sees with."""
    text, head = family.blocks.rpartition(".")[0], model.get_output_embeddings()
    outside = [path for path, module in model.named_modules() if module is not head and not under(path, text)]
    return [path for path in outside if not under(text, path)]


def head_of_embedding(model: PreTrainedModel) -> dict[str, str]:
    """The head's weight and that of the embedding, which a checkpoint with both tied holds alone."""
    names = {id(module): path for path, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at ``path``, or None."""
    return dict(module.named_modules()).get(path)
