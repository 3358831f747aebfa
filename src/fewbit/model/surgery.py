# SPDX-License-Identifier: Apache-2.0
"""A model whose residual stream is rotated while it is read from disk, its output staying what it was.

What becomes of a parameter follows from its place alone (:class:`Change`), so a rotated model is loaded as any other,
a module at a time. Products are float64. See :mod:`fewbit.transforms.quarot` for the equations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fewbit import transforms
from fewbit.core.transform import seed_of
from fewbit.errors import InputError, UnsupportedError
from fewbit.model.families import RESIDUALS, UNROTATABLE, Residual
from fewbit.model.sites import Site
from fewbit.transforms.quarot import Turn, turned

STREAM = "residual"
"""Name of the rotation of the residual stream; those of heads are called after their block."""
PIECE = 1 << 24
"""Weights that are turned at a time, where their rows do not mix: 128 MiB of float64."""

Read = Callable[[str], Tensor]
"""The values of a parameter as the checkpoint has them, by name."""


@dataclass(frozen=True)
class Change:
    """What becomes of a matrix (rows, columns), a stack of them, or a vector, which counts as a row.

    ``fold``: the norm's weight that multiplies the columns; ``divide``: that they are divided by. ``columns`` and
    ``rows``: rotations of these axes. ``fill``: what every entry is set to instead. ``transposed``: it lies in memory
    as (columns, rows). ``offset``: added to norms' weights.
    """

    fold: str | None = None
    divide: str | None = None
    columns: str | None = None
    rows: str | None = None
    fill: float | None = None
    transposed: bool = False
    offset: float = 0.0

    def of(self, value: Tensor, turns: Mapping[str, Turn], read: Read) -> Tensor:
        """``value`` changed, in its own dtype."""
        if self.fill is not None:
            return torch.full_like(value, self.fill)
        value = value.transpose(-1, -2) if self.transposed else value
        if self.fold is not None:
            value = value * (read(self.fold).to(value.dtype) + self.offset)
        if self.divide is not None:
            gain = read(self.divide).to(value.dtype) + self.offset
            if bool(((gain == 0) & (value != 0)).any()):
                works = "a model whose norms pass on every channel that they add to"
                raise InputError(f"folding {self.divide}", "it is zero where its bias is not", works)
            value = torch.where(value == 0, value, value / gain)
        if self.columns is not None:
            value = turns[self.columns].blocks(value)
        if self.rows is not None:
            value = turns[self.rows].blocks(value.transpose(-1, -2)).transpose(-1, -2)
        return value.transpose(-1, -2) if self.transposed else value


@dataclass(frozen=True, eq=False)
class Surgery:
    """``changes`` by parameter and the ``turns`` that they name; ``online``: transform by the site whose inputs are
    rotated when the model runs; ``untied``: the head that is stored apart from the embedding from now on, or None;
    ``notes``: what could not be done."""

    changes: Mapping[str, Change]
    turns: Mapping[str, Turn]
    online: Mapping[str, str]
    untied: str | None = None
    notes: Sequence[str] = ()

    def changed(self, name: str, value: Tensor, read: Read) -> Tensor:
        """The parameter ``name``, whose ``value`` the checkpoint has, computed in float64 and given in its dtype."""
        change = self.changes.get(name)
        if change is None:
            return value
        if change.rows is not None or change.transposed or value.ndim != 2:
            if value.ndim == 3:
                return torch.stack([change.of(one.double(), self.turns, read).to(value.dtype) for one in value])
            return change.of(value.double(), self.turns, read).to(value.dtype)
        pieces = value.split(max(1, PIECE // value.shape[1]))
        return torch.cat([change.of(piece.double(), self.turns, read).to(value.dtype) for piece in pieces])


@dataclass(frozen=True)
class Preparation:
    """A row of :data:`fewbit.transforms.MODEL_TRANSFORMS` by ``name``, its options, and the seed; ``learned``: what the
    matrices of rotations are, by name, instead of random ones."""

    name: str
    options: Mapping[str, float]
    seed: int = 0
    learned: Mapping[str, Tensor] = field(default_factory=dict)

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """The configuration of the rotated model: its head is no longer tied.

        Raises:
            UnsupportedError: the residual stream of such a model cannot be rotated.
        """
        if residual_of(config, self.name).centred and transforms.named_model(self.name).learns:
            found = "its norms subtract the mean, which a learned rotation would move"
            raise UnsupportedError(f"{self.name} of a {config.model_type} model", found, "quarot")
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
        return config

    def option(self, name: str) -> float:
        value: float = transforms.named_model(self.name).filled(self.options)[name]
        return value

    def turn(self, name: str, width: int, centred: bool = False) -> Turn:
        """The rotation called ``name``."""
        if name not in self.learned:
            return turned(width, seed_of(self.seed, name), centred)
        matrix = self.learned[name]
        return Turn(width, lambda x: x @ matrix.to(x.dtype))

    def plan(
        self,
        module: PreTrainedModel,
        sites: Sequence[Site],
        blocks: Sequence[str],
        around: tuple[list[str], list[str]],
        tied: bool,
    ) -> Surgery:
        """The surgery of ``module``, whose blocks lie at ``blocks`` and what surrounds them at ``around``.

        Raises:
            UnsupportedError: its residual stream cannot be rotated; the message says why.
        """
        return _Surgeon(self, module, sites, blocks, residual_of(module.config, self.name)).plan(around, tied)


def residual_of(config: PretrainedConfig, name: str) -> Residual:
    """The row for models of that configuration.

    Raises:
        UnsupportedError: there is none.
    """
    kind = config.model_type
    row = next((row for row in RESIDUALS if kind in row.types), None)
    reason = UNROTATABLE.get(kind, "how its blocks read and write the residual stream is in no row of RESIDUALS")
    if row is not None and kind == "opt":
        reason = "its blocks norm what they have added, or its embeddings are of another width"
        row = row if config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size else None
    if row is None:
        known = ", ".join(kind for row in RESIDUALS for kind in row.types)
        raise UnsupportedError(
            f"{name} of a {kind} model", reason, f"transform rotate or hadamard, layer by layer; {name} takes {known}"
        )
    return row


class _Surgeon:
    """Collects the changes of one model."""

    def __init__(
        self,
        preparation: Preparation,
        module: PreTrainedModel,
        sites: Sequence[Site],
        blocks: Sequence[str],
        row: Residual,
    ) -> None:
        self.preparation, self.module, self.blocks, self.row = preparation, module, blocks, row
        self.sites = {site.name: site for site in sites}
        self.modules = dict(module.named_modules())
        self.width = module.config.get_text_config().hidden_size
        self.changes: dict[str, Change] = {}
        self.turns = {STREAM: preparation.turn(STREAM, self.width, row.centred)}
        self.online: dict[str, str] = {}
        self.notes: list[str] = []

    def plan(self, around: tuple[list[str], list[str]], tied: bool) -> Surgery:
        before, after = around
        *norms, head = after
        if len(norms) != 1 or any(not isinstance(self.module.get_submodule(path), nn.Embedding) for path in before):
            found = f"{', '.join([*before, *norms])} surround its blocks"
            raise UnsupportedError(f"{self.preparation.name} of this model", found, "embeddings, and one norm after")
        for path in before:
            self.add(f"{path}.weight", Change(columns=STREAM))
        self.norm(norms[0], (head,))
        for index, block in enumerate(self.blocks):
            self.block(index, block)
        return Surgery(self.changes, self.turns, self.online, head if tied else None, tuple(self.notes))

    def block(self, index: int, block: str) -> None:
        for norm, readers in self.row.reads:
            self.norm(f"{block}.{norm}", tuple(f"{block}.{reader}" for reader in readers))
        for writer in self.row.writes:
            self.write(f"{block}.{writer}", None)
        head = self.heads(index, block)
        down = [f"{block}.{name}" for name in self.row.down] if self.preparation.option("down") else []
        output = [f"{block}.{self.row.output}"] if self.preparation.option("output") else []
        for name in down + output:
            self.rotate_online(name)
        stacked = f"{block}.mlp.experts.down_proj"
        if index == 0 and stacked in self.sites and self.preparation.option("down"):
            self.notes.append("inputs of experts' down projections are not rotated: nothing rewrites them at run time")
        if index == 0 and not head and self.preparation.option("heads"):
            self.notes.append("values are not rotated head by head: one matrix makes them with queries and keys")
        self.check(block)

    def heads(self, index: int, block: str) -> bool:
        """Turn values and what reads them; whether there is a matrix of values."""
        if self.row.value is None or f"{block}.{self.row.value}" not in self.sites:
            return False
        if not self.preparation.option("heads"):
            return True
        config = self.module.config
        width = getattr(config, "head_dim", None) or self.width // config.num_attention_heads
        turn = f"heads.{index}"
        self.turns[turn] = self.preparation.turn(turn, width)
        self.read(f"{block}.{self.row.value}", rows=turn)
        self.write(f"{block}.{self.row.output}", turn)
        return True

    def norm(self, norm: str, readers: Sequence[str]) -> None:
        """Fold ``norm`` into ``readers`` and turn what they read."""
        gain = f"{norm}.weight"
        self.add(gain, Change(fill=1.0 - self.row.offset))
        if self.has(f"{norm}.bias"):
            self.add(f"{norm}.bias", Change(divide=gain, columns=STREAM, offset=self.row.offset))
        for reader in readers:
            for name, transposed in self.parameters(reader):
                self.add(name, Change(gain, columns=STREAM, transposed=transposed, offset=self.row.offset))

    def read(self, reader: str, rows: str) -> None:
        """Turn what ``reader``, whose inputs are turned already, makes."""
        for name, _ in self.parameters(reader):
            old = self.changes[name]
            self.add(name, Change(old.fold, columns=old.columns, rows=rows, offset=old.offset))
        if self.has(f"{reader}.bias"):
            self.add(f"{reader}.bias", Change(columns=rows))

    def write(self, writer: str, columns: str | None) -> None:
        """Turn what ``writer`` adds to the stream, and what it reads, by ``columns``."""
        for name, transposed in self.parameters(writer):
            self.add(name, Change(columns=columns, rows=STREAM, transposed=transposed))
            if self.has(f"{writer}.bias"):
                self.add(f"{writer}.bias", Change(columns=STREAM))

    def rotate_online(self, name: str) -> None:
        site = self.sites.get(name)
        if site is None or site.kind not in ("linear", "conv1d"):
            return
        for transform in ("hadamard", "rotate"):
            reason = transforms.named(transform).refuse(site.shape[1])
            if reason is None:
                self.online[name] = transform
                return
        self.notes.append(f"inputs of {name} are not rotated: {reason}")

    def parameters(self, path: str) -> Iterator[tuple[str, bool]]:
        """The matrix at ``path`` and whether it lies in memory as (columns, rows); none where the model has none."""
        site = self.sites.get(path)
        if site is not None:
            yield site.parameter, site.transposed
        elif self.has(f"{path}.weight"):
            yield f"{path}.weight", False

    def has(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        module = self.modules.get(path)
        return module is not None and module._parameters.get(leaf) is not None

    def add(self, name: str, change: Change) -> None:
        if self.has(name):
            self.changes[name] = change

    def check(self, block: str) -> None:
        """Refuse a block with a parameter that no row places: half a rotation is another model."""
        inner = tuple(f"{block}.{name}." for name in self.row.inner)
        for name, parameter in self.module.get_submodule(block).named_parameters(prefix=block):
            bias = name.endswith("bias") and parameter.ndim == 1
            if name not in self.changes and not name.startswith(inner) and not bias:
                found = f"nothing is known of {name} (shape {tuple(parameter.shape)})"
                raise UnsupportedError(f"{self.preparation.name} of this model", found, "transform hadamard")
