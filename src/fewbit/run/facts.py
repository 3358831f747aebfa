# SPDX-License-Identifier: Apache-2.0
"""Facts on disk: what a calibration found, once, for any number of runs.

::

    facts.json                  what model and text they are of (hashes), what was collected, hash of every file
    inputs-00000.safetensors    of block 0: sums over the inputs of every site, {site}.{array}, (experts, ...); and what
                                observers look at, {site}.range_counts, (bins,), and {site}.range_ends, (batches, 2);
                                least and largest input of each column, {site}.ends, (2, columns)
    fisher-00000.safetensors    of block 0: the Fisher diagonal of every weight, {site}, (experts * rows, columns), and
                                the squared gradients at the outputs, {site}.output, (experts, rows)

Sites that see the same inputs share their sums: the header's ``__metadata__`` says whose a site's are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbit.containers import manifest as M
from fewbit.containers.files import digest, read_json
from fewbit.containers.manifest import FACTS
from fewbit.containers.safetensors import SafetensorsFile, open_safetensors, write_safetensors
from fewbit.core import given
from fewbit.core.facts import Facts
from fewbit.core.observers import Seen
from fewbit.core.sums import all_finite
from fewbit.errors import CorruptFileError, InputError
from fewbit.model.sites import Site

VERSION = 2
RANGES = ("range_counts", "range_ends")
SUMS = ("total", "total_square", "total_magnitude", "largest")
_REQUIRED = {"facts": int, "model": dict, "calibration": dict, "collected": list, "blocks": int, "files": dict}


def inputs_file(folder: Path, block: int) -> Path:
    return folder / f"inputs-{block:05d}.safetensors"


def fisher_file(folder: Path, block: int) -> Path:
    return folder / f"fisher-{block:05d}.safetensors"


def write_inputs(path: Path, found: Mapping[str, list[Facts]]) -> str:
    """Write the facts of a block's sites, one entry an expert, and return the file's sha256.

    Raises:
        InputError: sums of squares hold NaN or infinity, which serves no method; the message names the site.
    """
    tensors: dict[str, Tensor] = {}
    owners: dict[tuple[int, ...], str] = {}
    of: dict[str, str] = {}
    for site, parts in found.items():
        owner = of[site] = owners.setdefault(tuple(map(id, parts)), site)
        if owner != site:
            continue
        if not all(all_finite(part.total_square) for part in parts):
            works = "check that the model runs in float on the calibration text"
            raise InputError(f"facts of {site}", "squares of its inputs add up to NaN or infinity", works)
        for array in (*SUMS, "gram"):
            values = [value for part in parts if isinstance(value := getattr(part, array), Tensor)]
            if len(values) == len(parts):
                tensors[f"{site}.{array}"] = torch.stack(values)
        if len(parts) == 1 and (seen := parts[0].ranges) is not None:
            tensors |= dict(zip((f"{site}.{array}" for array in RANGES), (seen.counts, seen.ends), strict=True))
        if len(parts) == 1 and (ends := parts[0].ends) is not None:
            tensors[f"{site}.ends"] = ends
        tensors[f"{site}.tokens"] = torch.tensor([part.tokens for part in parts])
    return write_safetensors(path, tensors, {"format": "pt", **of})


def read_inputs(path: Path, site: Site) -> list[Facts]:
    """The facts of ``site``, one entry an expert.

    Raises:
        InputError: the file has none. CorruptFileError: they are of another shape.
    """
    found = stored(open_safetensors(path), site.name)
    if (len(found), found[0].columns) != (site.experts, site.shape[1]):
        sizes = f"{len(found)} of {found[0].columns} columns, not {site.experts} of {site.shape[1]}"
        raise CorruptFileError(f"facts of {site.name} in {path}", sizes, "collect them again")
    return found


def owners(file: SafetensorsFile) -> dict[str, str]:
    """Whose sums the sums of a site are, by name of the site."""
    return {site: owner for site, owner in file.metadata.items() if site != "format"}


def stored(file: SafetensorsFile, site: str) -> list[Facts]:
    """The facts of ``site`` in a file that :func:`write_inputs` wrote, one entry an expert.

    Raises:
        InputError: it has none. CorruptFileError: arrays are missing or do not fit together.
    """
    if (owner := owners(file).get(site)) is None:
        raise InputError(f"facts of {site} in {file.path}", "there are none", "collect them again")
    found = {array: file.get(key) for array in (*SUMS, "gram") if (key := f"{owner}.{array}") in file.entries}
    if not {"total", "total_square"} <= found.keys() or found["total"].ndim != 2:
        raise CorruptFileError(f"facts of {owner} in {file.path}", "sums are missing", "collect them again")
    experts, columns = found["total"].shape
    tokens = file.get(f"{owner}.tokens").tolist()
    for array, values in found.items():
        expected = (experts, columns, columns) if array == "gram" else (experts, columns)
        if tuple(values.shape) != expected or len(tokens) != experts:
            shape = tuple(values.shape)
            raise CorruptFileError(f"{owner}.{array} of {file.path}", f"its shape is {shape}, not {expected}")
    sums, ranges, ends = {"largest": None, **found}, _ranges(file, owner), _ends(file, owner, columns)
    return [
        Facts(
            columns,
            tokens[i],
            **{array: values if values is None else values[i] for array, values in sums.items()},  # type: ignore[arg-type]
            ranges=ranges,
            ends=ends,
        )
        for i in range(experts)
    ]


def _ranges(file: SafetensorsFile, owner: str) -> Seen | None:
    """The histogram of the inputs of ``owner``; None where none was collected."""
    counts, ends = (f"{owner}.{array}" for array in RANGES)
    if counts not in file.entries:
        return None
    try:
        return Seen.kept(file.get(counts), file.get(ends))
    except (InputError, RuntimeError) as error:
        raise CorruptFileError(f"{counts} of {file.path}", str(error), "collect them again") from None


def _ends(file: SafetensorsFile, owner: str, columns: int) -> Tensor | None:
    """The extremes of each input of ``owner``; None where they were not collected."""
    if (key := f"{owner}.ends") not in file.entries:
        return None
    ends = file.get(key)
    if tuple(ends.shape) != (2, columns) or bool(ends.isnan().any()):
        found = f"{tuple(ends.shape)} numbers, or NaN among them, are no ends of {columns} columns"
        raise CorruptFileError(f"{key} of {file.path}", found, "collect them again")
    return ends


def read_fisher(path: Path, site: Site) -> list[Tensor]:
    """The Fisher diagonal of ``site``, float32 (rows, columns) of every expert."""
    return _read(path, site.name, (site.experts, *site.shape))


def read_outputs(path: Path, site: Site) -> list[Tensor]:
    """The squared gradients at the outputs of ``site``, float32 (rows,) of every expert."""
    return _read(path, outputs_key(site.name), (site.experts, site.shape[0]))


def outputs_key(site: str) -> str:
    return f"{site}.output"


def _read(path: Path, key: str, shape: tuple[int, ...]) -> list[Tensor]:
    whole = open_safetensors(path).get(key)
    if whole.numel() != math.prod(shape):
        raise CorruptFileError(f"{key} of {path}", f"its shape is {tuple(whole.shape)}", "collect it again")
    return list(whole.reshape(shape))


class Gradients(Protocol):
    """What knows of gradients: a pass, or a folder."""

    def fisher(self, site: Site) -> list[Tensor] | None: ...

    def output_square(self, site: Site) -> list[Tensor] | None: ...


def with_gradients(known: list[Facts], source: Gradients, site: Site) -> list[Facts]:
    """``known`` of ``site``, one entry an expert, with what ``source`` has of it."""
    if (fisher := source.fisher(site)) is not None:
        known = [replace(of, fisher=part) for of, part in zip(known, fisher, strict=True)]
    if (outputs := source.output_square(site)) is not None:
        known = [replace(of, output_square=part) for of, part in zip(known, outputs, strict=True)]
    return known


@dataclass(frozen=True)
class KeptFacts:
    """A finished folder; ``described`` is its ``facts.json``."""

    path: Path
    described: dict[str, Any]

    @staticmethod
    def read(path: str | Path) -> KeptFacts:
        """Checked, every file's hash included.

        Raises:
            InputError: no such folder. CorruptFileError: it is damaged, or of a newer version.
        """
        folder = given.place("facts", path)
        if not (folder / FACTS).is_file():
            raise InputError(f"facts in {folder}", f"it holds no {FACTS}", "a folder that `fewbit calibrate` wrote")
        described = read_json(folder / FACTS)
        for key, kind in _REQUIRED.items():
            if not isinstance(described.get(key), kind):
                raise CorruptFileError(f"{folder / FACTS}", f"field {key!r} is missing or of the wrong type")
        if described["facts"] != VERSION:
            works = f"version {VERSION}: collect them again"
            raise CorruptFileError(f"{folder / FACTS}", f"version {described['facts']}", works)
        M.check_files(folder, described)
        return KeptFacts(folder, described)

    @property
    def sha256(self) -> str:
        """Of all that was found: ``facts.json`` holds the hash of every file."""
        return digest(self.path / FACTS)

    def check(self, model: Mapping[str, str], data: str | None = None) -> None:
        """They are of this model (hashes by name), and of the text whose hash is ``data``, where that is given.

        Raises:
            InputError: they are not; the message says in what they differ.
        """
        works = "run `fewbit calibrate` again on this model and text"
        for what, expected in model.items():
            if (found := self.described["model"].get(what)) != expected:
                hashes = f"the hash of their model's {what} is {found}, not {expected}"
                raise InputError(f"facts in {self.path}", hashes, works)
        if data is not None and (found := self.described["calibration"].get("sha256")) != data:
            raise InputError(f"facts in {self.path}", f"the hash of their text's tokens is {found}, not {data}", works)

    def require(self, site: str, need: str) -> None:
        """Raises InputError unless what ``site`` needs was collected."""
        if need in ("gram", "fisher", "ranges") and need not in self.described["collected"]:
            found = f"without --no-{need}"
            raise InputError(f"{need} of {site}, from {self.path}", "it was not collected", f"collect again {found}")

    def of(self, site: Site) -> list[Facts] | None:
        """The facts of ``site``, one entry an expert, without its Fisher diagonal; None outside of blocks."""
        return None if site.block is None else read_inputs(inputs_file(self.path, site.block), site)

    def ranges(self, site: Site) -> Seen:
        """The histogram of the inputs of ``site``.

        Raises:
            InputError: none was collected, as of what lies outside of blocks.
        """
        file = None if site.block is None else open_safetensors(inputs_file(self.path, site.block))
        seen = None if file is None else _ranges(file, owners(file).get(site.name, site.name))
        if seen is None:
            raise InputError(f"ranges of {site.name}, from {self.path}", "there are none", "collect them again")
        return seen

    def ends(self, site: Site) -> Tensor:
        """Least and largest input of each column of ``site``, (2, columns) float32.

        Raises:
            InputError: they were not collected, as of what lies outside of blocks, and by versions that kept none.
        """
        file = None if site.block is None else open_safetensors(inputs_file(self.path, site.block))
        ends = None if file is None else _ends(file, owners(file).get(site.name, site.name), site.shape[1])
        if ends is None:
            works = "collect them again with this version, without --no-ranges"
            raise InputError(f"extremes of the inputs of {site.name}, from {self.path}", "there are none", works)
        return ends

    def fisher(self, site: Site) -> list[Tensor] | None:
        """The Fisher diagonal of ``site``, one entry an expert; None outside of blocks, or where there is none."""
        if site.block is None or "fisher" not in self.described["collected"]:
            return None
        return read_fisher(fisher_file(self.path, site.block), site)

    def output_square(self, site: Site) -> list[Tensor] | None:
        """The squared gradients at the outputs of ``site``, one entry an expert; None as for the Fisher diagonal."""
        if site.block is None or "fisher" not in self.described["collected"]:
            return None
        return read_outputs(fisher_file(self.path, site.block), site)
