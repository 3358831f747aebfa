# SPDX-License-Identifier: Apache-2.0
"""A folder's model made ready for the native runtime, which takes torch: its matrices are repacked as kernels read
them."""

from __future__ import annotations

import ctypes as C
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fewbit import formats
from fewbit.containers import manifest as M
from fewbit.containers.files import read_json
from fewbit.containers.shards import refuse_scaled, weight_files
from fewbit.decode.configs import config_of, has_text_part, is_tied
from fewbit.decode.describe import describe
from fewbit.decode.families import TEXT_PARTS, Shape, shape_of
from fewbit.decode.opened import Model
from fewbit.decode.source import Pages, Source, mapped
from fewbit.errors import CorruptFileError, UnsupportedError

Held = TypeVar("Held")


def described(folder: Path, activation: str | None) -> Model:
    """The model in ``folder``, which its :class:`fewbit.decode.source.Source` keeps. Files that a manifest names
    are compared with their hashes first.

    Raises:
        CorruptFileError: a file is missing or its bytes changed; there is no head.
        UnsupportedError: the family or a matrix is none that the runtime knows. SpecError: ``activation`` is no format.
    """
    if activation is not None:
        formats.parse(activation)  # refused before anything is read
    shape = shape_of(config_of(folder))
    if (folder / M.NAME).is_file():
        M.check_files(folder, M.read(folder))
    source = open_source(folder, activation)
    if not source.has("lm_head") and not is_tied(folder):
        found = "it does not hold it, and config.json does not tie it to the embedding"
        raise CorruptFileError(f"tensor lm_head.weight of {folder}", found, "the folder as it was published")
    address = C.addressof(describe(shape, source))
    return Model(address, shape.vocabulary, shape.context, _read_bytes(shape, source), source)


def _read_bytes(shape: Shape, source: Source) -> int:
    """All matrices but the embedding, of which a row is read, and of the experts those that are chosen."""
    tied = not source.has("lm_head") or "tied_to" in source.modules.get("lm_head", {})
    total = 0
    for name, size in source.sizes.items():
        if ".experts." in name:
            experts = next(layer.experts for layer in shape.layers if layer.experts)
            total += size * shape.experts_per_token // experts
        elif tied or name != "model.embed_tokens":
            total += size
    return total


def _text_part(named: Mapping[str, Held], names: Sequence[tuple[str, str]]) -> dict[str, Held]:
    """Those of ``named`` whose name, a dot after it, begins as one in ``names`` says, called as that says."""
    return {
        (new + f"{name}.".removeprefix(old)).removesuffix("."): value
        for name, value in named.items()
        for old, new in names
        if f"{name}.".startswith(old)
    }


def open_source(folder: Path, activation: str | None) -> Source:
    """The arrays of ``folder``: mapped, or, where its names differ from those of transformers' module tree, as
    transformers loads them.

    Raises:
        UnsupportedError: something else than fewbit has quantized them.
    """
    rounding = None if activation is None else formats.parse(activation)
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    by = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization and by != "fewbit":
        raise UnsupportedError("the native runtime", f"the model was quantized by {by}", "what fewbit quantize writes")
    names = TEXT_PARTS[config["model_type"]] if has_text_part(config) else (("", ""),)
    opened = weight_files(folder)
    if not quantization:
        refuse_scaled(folder, opened)
    files = [mapped(file) for file in opened]
    modules = _text_part(quantization.get("modules", {}), names)
    tensors = _text_part({name: tensor for _, held in files for name, tensor in held.items()}, names)
    fused = any(".experts." in name and name.endswith(".weight") for name in tensors)
    if fused or (not modules and "model.embed_tokens.weight" not in tensors):
        from fewbit.model.classes import from_folder

        tensors = _text_part(from_folder(folder).state_dict(), names)
    return Source(tensors, modules, rounding, Pages(*(pages for pages, _ in files)))
