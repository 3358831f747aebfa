# SPDX-License-Identifier: Apache-2.0
"""What a layer may become: formats with the method that fits each, ``int4/g64/asym`` or ``palette3/row:skm``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Terms
from fewbit.errors import SpecError
from fewbit.model.sites import Site
from fewbit.recipe import FLOAT, Rule, split_scheme
from fewbit.run.facts import KeptFacts, with_gradients
from fewbit.run.solve import fit

DEFAULT = tuple(f"int{bits}/g64/asym" for bits in (2, 3, 4, 5, 6, 8))

Solution = list[QTensor | Terms]
"""What stands for a layer, one entry an expert."""


def parse(texts: Sequence[str], method: str) -> list[Rule]:
    """Rules that match all, from ``FORMAT`` (fitted by ``method``) or ``FORMAT:METHOD``.

    Raises:
        SpecError: no such format or method, one that rounds activations or keeps floats, one named twice, or none.
    """
    found: list[Rule] = []
    for text in texts:
        spelt, _, own = text.partition(":")
        weight, activation = split_scheme(spelt)
        if activation is not None or weight == FLOAT:
            works = "formats of weights, such as int4/g64/asym or palette3/row:skm"
            raise SpecError(f"candidate {text!r}", "what it costs is not known from the weight alone", works)
        format = formats.parse(weight).name
        rule = Rule("*", format, own or method)
        if rule in found:
            raise SpecError(f"candidate {text!r}", "it is named twice", "name it once")
        found.append(rule)
    if not found:
        raise SpecError("allocating bits", "no candidate is named", "e.g. " + " ".join(DEFAULT[:3]))
    return found


def spelling(rule: Rule) -> str:
    """What :func:`parse` reads."""
    return f"{rule.format}:{rule.method}"


def fitted_by(rule: Rule, method: str | None) -> Rule:
    """``rule`` with ``method`` in place of its own, where one is given that takes its format."""
    if method is None or methods.named(method).refuse(formats.parse(rule.format)) is not None:
        return rule
    return replace(rule, method=method, options={})


def known_of(kept: KeptFacts, site: Site) -> list[Facts]:
    """What is known of a layer of a block, one entry an expert, with the Fisher diagonal where it was collected."""
    return with_gradients(kept.of(site) or [], kept, site)


def solve(rule: Rule, weight: Tensor, known: Sequence[Facts]) -> Solution:
    """``weight`` (experts * rows, columns) by ``rule``; an expert that saw no token is rounded to nearest, as in a
    run."""
    format = formats.parse(rule.format)
    return [fit(part, format, facts, rule)[0] for part, facts in zip(weight.chunk(len(known)), known, strict=True)]


def values(solution: Solution) -> Tensor:
    """Float32 (experts * rows, columns)."""
    return torch.cat([part.dequantize() for part in solution])
