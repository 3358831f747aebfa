# SPDX-License-Identifier: Apache-2.0
"""Weights as arrays and a description: through a file and back, the same; and no description that lies."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit import formats, layouts, methods
from fewbit.containers import terms as T
from fewbit.containers.safetensors import open_safetensors, write_safetensors
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Terms
from fewbit.errors import CorruptFileError, FewbitError

SHAPE = (12, 40)


def matrix(rows: int, columns: int, format: str = "int4/g16/asym") -> QTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return methods.rtn(weight, formats.parse(format)).repack(layouts.named("dense"))


def everything() -> Terms:
    """Each kind of term, scales of each dtype, indices of each width."""
    generator = torch.Generator().manual_seed(0)
    outliers = torch.randn(SHAPE, generator=generator)
    outliers = torch.where(outliers.abs() > 1.5, outliers, 0.0)
    order = torch.randperm(40, generator=generator).to(torch.uint16)
    signs = Product(
        matrix(12, 5, "sign/channel"), torch.randn(5, generator=generator).bfloat16(), matrix(5, 40, "nf4/g64")
    )
    wide = Sparse.at((12, 8), torch.tensor([1, 7]), torch.tensor([0, 7]), torch.tensor([1.5, -2.0]), torch.float32)
    halves = Columns(order, (Dense(matrix(12, 32, "int8/channel/sym")), Terms((12, 8), (wide,), torch.rand(12))))
    more = Terms(SHAPE, (Product(signs.left, None, signs.right),), None, torch.rand(40).half())
    return Terms(SHAPE, (Dense(matrix(*SHAPE)), Sparse.of(outliers), signs, halves, more), torch.rand(12).half())


@pytest.mark.parametrize("weight", [everything(), matrix(*SHAPE), matrix(7, 33, "nf4/g64")], ids=["sum", "int4", "nf4"])
def test_what_is_written_is_read(weight: T.Weight, tmp_path: Path) -> None:
    plain = json.loads(json.dumps(T.describe(weight)))
    arrays = T.arrays(weight, plain)
    write_safetensors(tmp_path / "file", {f"layer.weight_{name}": array for name, array in arrays.items()})
    file = open_safetensors(tmp_path / "file")
    found = {name: file.get(f"layer.weight_{name}") for name in T.sizes(plain)}
    assert found.keys() == arrays.keys() and len(file.entries) == len(arrays)
    assert {name: (array.dtype, tuple(array.shape)) for name, array in found.items()} == T.sizes(plain)
    back = T.restore(plain, found)
    assert type(back) is type(weight) and torch.equal(back.dequantize(), weight.dequantize())
    assert T.describe(back) == plain and back.nbytes == weight.nbytes
    assert sum(array.nbytes for array in arrays.values()) == weight.nbytes


def test_arrays_are_in_the_layouts_of_the_description() -> None:
    plain = T.describe(Terms(SHAPE, (Dense(matrix(*SHAPE)),)))
    unpacked = QTensor.of(matrix(*SHAPE).format, *matrix(*SHAPE).logical())
    stored = T.arrays(Terms(SHAPE, (Dense(unpacked),)), plain)
    assert torch.equal(stored["0_packed"], matrix(*SHAPE).packed) and not torch.equal(
        unpacked.packed, stored["0_packed"]
    )


def test_names_say_where_an_array_belongs() -> None:
    names = T.sizes(T.describe(everything())).keys()
    assert {"row_scale", "0_packed", "0_scale", "1_pointers", "2_left_packed", "2_middle", "3_permutation"} <= names
    assert {"3_1_0_columns", "4_column_scale", "4_0_right_scale"} <= names and "4_0_middle" not in names
    assert T.summary(T.describe(everything())).startswith("int4/g16/asym + sparse + sign/channel times nf4/g64 + ")


def test_entries_of_configurations_hold_either() -> None:
    plain = T.describe(matrix(*SHAPE))
    assert T.of_entry({"kind": "linear", "format": "int4/g16/asym", "layout": "dense", "shape": [12, 40]}) == plain
    terms = T.describe(everything())
    assert T.of_entry({"kind": "linear", "shape": [12, 40], "terms": terms}) is terms


def lies() -> list[tuple[str, Any]]:
    """(what is wrong, a description)."""
    good: Any = T.describe(everything())

    def changed(path: list[str], value: Any) -> Any:
        made = copy.deepcopy(good)
        inner = made
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return made

    return [
        ("no kind", {}),
        ("a list", [1]),
        ("unknown kind", changed(["parts", "1", "kind"], "dance")),
        ("another shape", changed(["shape"], [12, 41])),
        ("a negative shape", changed(["shape"], [-12, 40])),
        ("shape of three", changed(["shape"], [12, 40, 1])),
        ("shape of a matrix", changed(["parts", "0", "shape"], [12, 48])),
        ("shape of entries", changed(["parts", "1", "shape"], [12, 30])),
        ("unknown dtype", changed(["arrays", "row_scale", 0], "F7")),
        ("scale of another length", changed(["arrays", "row_scale"], ["F16", [13]])),
        ("sizes that are no numbers", changed(["arrays", "row_scale"], ["F16", ["12"]])),
        ("unknown format", changed(["parts", "0", "format"], "int99")),
        ("unknown layout", changed(["parts", "0", "layout"], "nowhere")),
        ("a part too few", changed(["parts"], {"1": good["parts"]["1"]})),
        ("a factor that is a sum", changed(["parts", "2", "parts", "left"], good)),
        ("parts that are none", changed(["parts"], 3)),
        ("a lone term", good["parts"]["1"]),
    ]


@pytest.mark.parametrize("plain", [lie for _, lie in lies()], ids=[what for what, _ in lies()])
def test_descriptions_that_lie_are_refused(plain: Any) -> None:
    """Either at once, or when arrays of the sizes that it asks for are there."""
    with pytest.raises(FewbitError):
        T.restore(plain, {name: torch.ones(size).to(dtype) for name, (dtype, size) in T.sizes(plain).items()})


def test_arrays_that_contradict_one_another_are_refused() -> None:
    plain = T.describe(everything())
    good = T.arrays(everything(), plain)
    for name, value in (
        ("1_pointers", torch.zeros_like(good["1_pointers"])),
        ("3_permutation", torch.zeros_like(good["3_permutation"])),
        ("row_scale", torch.full_like(good["row_scale"], torch.inf)),
        ("2_middle", None),
        ("1_values", None),
    ):
        bad = {key: array for key, array in good.items() if key != name}
        if value is not None:
            bad[name] = value
        with pytest.raises(CorruptFileError):
            T.restore(plain, bad)
