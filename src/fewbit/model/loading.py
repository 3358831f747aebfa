# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's tensors to a module's parameters, a few at a time.

A checkpoint names and cuts its tensors in its own way (one tensor an expert, old names); transformers describes the way
to its modules as renamings and converters. They are applied here to the tensors under one module path only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from fewbit.core.room import converted
from fewbit.errors import InputError, UnsupportedError, first_line
from fewbit.model.checkpoint import Checkpoint, check_finite


def under(name: str, prefix: str) -> bool:
    """Whether ``name`` is ``prefix`` or lies below it; the empty prefix holds everything."""
    return not prefix or name == prefix or name.startswith(prefix + ".")


@dataclass
class Group:
    """Checkpoint tensors that become parameters together: ``sources`` are (key, pattern of the converter)."""

    converter: WeightConverter | None
    targets: tuple[str, ...]
    sources: list[tuple[str, str]] = field(default_factory=list)


class Loader:
    """The plan of a model's loading, made once from names and shapes alone.

    ``unused`` are tensors that the model has no place for; ``tied`` maps a parameter to the one that it shares.
    ``copies`` maps a parameter that the checkpoint may lack to the one whose tensor it then takes. ``change`` is what
    every parameter goes through after it was read.

    Raises:
        InputError: on construction, a parameter has no tensor, or one of another shape. UnsupportedError: one of
            integers.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, copies: Mapping[str, str] | None = None) -> None:
        self.checkpoint, self.model = checkpoint, model
        self.unused: list[str] = []
        self.change: Callable[[str, Tensor], Tensor] = lambda name, value: value
        places = model.state_dict()
        self._names = tuple(places)
        self.groups = self._plan(places)
        self.of = {target: group for group in self.groups for target in group.targets}
        for name, source in (copies or {}).items():
            if name not in self.of and source in self.of:
                self.of[name] = Group(None, (name,), self.of[source].sources)
        self.tied = self._ties()
        self._check(places)

    def _plan(self, places: dict[str, Tensor]) -> list[Group]:
        transforms = self.checkpoint.transforms(self.model, places)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self.model.base_model_prefix
        groups: dict[str, Group] = {}
        for key in sorted(self.checkpoint.keys(), key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, places)
            if name not in places and key in places:
                name, pattern = rename_source_key(key, [], [], prefix, places)
            if name not in places:
                self.unused.append(key)
                continue
            if name not in groups:
                converter = by_pattern[pattern] if pattern is not None else None
                groups[name] = Group(converter, _targets(name, converter, places))
            elif pattern is None:
                raise InputError(f"reading {self.checkpoint.path}", f"two tensors stand for {name}")
            groups[name].sources.append((key, pattern if pattern is not None else key))
        return list(groups.values())

    def _ties(self) -> dict[str, str]:
        """Parameter -> the parameter whose values it takes, with a source that the checkpoint really has."""
        ties: dict[str, str] = {}
        for target, source in self.model.all_tied_weights_keys.items():
            if target in self.of and source in self.of:
                if self._same(target, source):
                    ties[target] = source
            elif source in self.of:
                ties[target] = source
            elif target in self.of:
                ties[source] = target
        return ties

    def _same(self, one: str, other: str) -> bool:
        """Whether two parameters that ought to be tied hold the same values in the checkpoint."""
        first, second = self.of[one].sources, self.of[other].sources
        if len(first) != 1 or len(second) != 1:
            return False
        return torch.equal(self.checkpoint.get(first[0][0]), self.checkpoint.get(second[0][0]))

    def _check(self, places: dict[str, Tensor]) -> None:
        missing = [name for name in places if name not in self.of and self.tied.get(name) not in self.of]
        if missing:
            raise InputError(
                f"loading {self.checkpoint.path} as {self.checkpoint.architecture}",
                f"{len(missing)} tensors are missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}",
                "a complete checkpoint whose config.json is its own",
            )
        for group in self.groups:
            self._check_kind(group, places)
            self._make(group, lambda key: torch.empty(self.checkpoint.shape(key), device="meta"))

    def _check_kind(self, group: Group, places: dict[str, Tensor]) -> None:
        """Refuse integers where floats are expected: their scales, if any, have no place in the model."""
        whole = [key for key, _ in group.sources if not self.checkpoint.floating(key)]
        if whole and places[group.targets[0]].is_floating_point():
            asked = f"loading {self.checkpoint.path} as {self.checkpoint.architecture}"
            raise UnsupportedError(asked, f"{whole[0]} holds integers, as quantized weights do", "the original weights")

    def _make(self, group: Group, fetch: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters that ``group`` makes of what ``fetch`` gives for a key, by name, checked for shape."""
        keys = [key for key, _ in group.sources]
        if group.converter is None:
            values = {group.targets[0]: fetch(keys[0])}
        else:
            converter = copy.deepcopy(group.converter)
            for key, pattern in group.sources:
                converter.add_tensor(group.targets[0], key, pattern, partial(fetch, key))
            try:
                made = converter.convert(group.targets[0], model=self.model, config=self.model.config)
            except (RuntimeError, ValueError, IndexError) as error:  # what torch raises for shapes that do not fit
                raise InputError(
                    f"making {group.targets[0]} of {len(keys)} tensors of {self.checkpoint.path} ({keys[0]}, ...)",
                    first_line(error),
                    "a complete checkpoint whose config.json is its own",
                ) from error
            values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        for name, value in values.items():
            expected = tuple(self.model.get_parameter_or_buffer(name).shape)
            if tuple(value.shape) != expected:
                raise InputError(
                    f"{name} of {self.checkpoint.path}",
                    f"its shape is {tuple(value.shape)}, from {len(keys)} tensors such as {keys[0]}",
                    f"{expected}, says its configuration",
                )
        return values

    def read(self, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters that ``group`` makes, by name; NaN and Inf are refused."""
        values = self._make(group, lambda key: converted(self.checkpoint.get(key), dtype))
        for name, value in values.items():
            check_finite(name, value)
        return {name: self.change(name, value) for name, value in values.items()}

    def original(self, name: str) -> Tensor:
        """The parameter ``name`` in float64 as the checkpoint has it, whatever ``change`` makes of it."""
        return self._make(self.of[name], lambda key: self.checkpoint.get(key).double())[name]

    def load(self, prefix: str, dtype: torch.dtype) -> None:
        """Make every parameter and stored buffer under ``prefix`` real.

        Raises:
            InputError: a tensor of the wrong shape, or with NaN or Inf; or nothing of that name.
        """
        names = [name for name in self._names if under(name, prefix)]
        if not names:
            raise InputError(f"loading {prefix}", "the model has no parameter there")
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            source = self.tied.get(name, name)
            shared = self.model.get_parameter_or_buffer(source)
            if source != name and not shared.is_meta and shared.dtype == dtype:
                place(self.model, name, shared)
                continue
            for made, value in self.read(self.of[source], dtype).items():
                slot = name if made == source else made
                if under(slot, prefix):
                    place(self.model, slot, _alone(value))
                    done.add(slot)
        empty = [name for name in names if self.model.get_parameter_or_buffer(name).is_meta]
        if empty:
            raise InputError(f"loading {prefix} of {self.checkpoint.path}", f"still missing: {', '.join(empty[:5])}")

    def free(self, prefix: str) -> None:
        """Drop the values of every parameter and stored buffer under ``prefix``."""
        for name in self._names:
            if under(name, prefix):
                place(self.model, name, self.model.get_parameter_or_buffer(name).detach().to("meta"))


def unexpected(model: PreTrainedModel, keys: list[str]) -> list[str]:
    """Those of ``keys``, tensors without a place in ``model``, that are no buffer which some version stored."""
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    buffers = {name for name, _ in model.named_buffers()}
    return [key for key in keys if key not in buffers and not any(re.search(each, key) for each in known)]


def _alone(value: Tensor) -> Tensor:
    """``value`` contiguous in a storage of its own: a slice would keep alive what it was cut from."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def place(model: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` where the parameter or buffer ``name`` is, without copying it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        own = isinstance(value, nn.Parameter)
        module._parameters[leaf] = value if own else nn.Parameter(value, requires_grad=False)  # type: ignore[assignment]


def _targets(first: str, converter: WeightConverter | None, places: dict[str, Tensor]) -> tuple[str, ...]:
    """Every parameter that a converter whose first target is ``first`` makes."""
    if converter is None:
        return (first,)
    patterns = converter.target_patterns
    names = [first, *(first.replace(patterns[0], other) for other in patterns[1:])]
    return tuple(name for name in names if name in places)
