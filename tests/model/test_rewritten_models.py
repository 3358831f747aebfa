# SPDX-License-Identifier: Apache-2.0
"""Law 6 on whole models: with every layer's input rewritten and nothing quantized, the logits stay what they were."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, ids, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fewbit import formats, transforms
from fewbit.core.facts import Facts
from fewbit.core.rewrite import Chain
from fewbit.core.transform import Transform, seed_of
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.sites import Site
from fewbit.model.stream import StreamedModel

ALL = tuple(sorted(transforms.TRANSFORMS, key=lambda row: row.name == "rotate"))
"""Rotations last: what is measured of inputs is not known of rotated ones."""
ALONE = dict(zip(FAMILIES, itertools.cycle(transforms.TRANSFORMS), strict=False))
"""The one that each family is also rewritten by alone: by turns."""
NOISE = 32
"""The rewritten model may be this many times as far from the original as float32 itself is from float64: each entry is
rounded a few times more (once by a scale, up to 6 times by a Hadamard factor), in weight and input, before products
that are rounded as before."""


def loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def reachable(folder: Path) -> list[Site]:
    """Sites whose inputs can be rewritten when the model runs."""
    sites = StreamedModel.open(open_checkpoint(folder)).sites
    return [s for s in sites if s.kind in ("linear", "conv1d", "head") and s.tied_to is None]


def rewrite(model: nn.Module, sites: list[Site], rows: tuple[Transform, ...], tokens: Tensor) -> None:
    """Fit ``rows`` to every site on what it sees of ``tokens``, and put them to work."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, x, name=site.name: seen.__setitem__(name, x[0].reshape(-1, x[0].shape[-1]).clone())
        )
        for site in sites
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    for site in sites:
        module = model.get_submodule(site.name)
        transposed = isinstance(module, Conv1D)
        weight = module.weight.data.T if transposed else module.weight.data
        steps, facts = [], Facts.of(seen[site.name], gram=True)
        for row in rows:
            if row.refuse(site.shape[1]) is None:
                step = row(weight, facts, seed_of(0, site.name), formats.parse("int4/g32/asym"))
                steps.append(step)
                weight, facts = step.weight(weight), step.facts(facts)
        module.weight.data = weight.T.contiguous() if transposed else weight
        chain = Chain(tuple(steps))
        module.register_forward_pre_hook(lambda module, x, chain=chain: (chain.apply(x[0]), *x[1:]))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_law_6_logits_do_not_move(family: str, tmp_path: Path) -> None:
    make(family, tmp_path)
    tokens, sites = ids(), reachable(tmp_path)
    model = loaded(tmp_path)
    original = model(tokens).logits
    noise = (original - copy.deepcopy(model).double()(tokens).logits).abs().max()
    assert len(sites) >= 6
    for rows in (ALL, (ALONE[family],)):
        twin = copy.deepcopy(model)
        rewrite(twin, sites, rows, tokens)
        moved = (twin(tokens).logits - original).abs().max()
        assert 0 < moved <= NOISE * noise, [row.name for row in rows]
