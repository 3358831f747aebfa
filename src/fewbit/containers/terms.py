# SPDX-License-Identifier: Apache-2.0
"""Weights as named arrays and a plain description of them, which together are the weight again.

A quantized matrix is ``{"kind": "dense", "format", "layout", "shape"}``, with the arrays ``packed`` and the parameters
of its format. A sum of terms (:mod:`fewbit.core.terms`) is a tree of::

    {"kind": "sum", "product", "sparse" or "columns", "shape": [rows, columns],
     "arrays": {name: [dtype as in safetensors, sizes]},    those of its own
     "parts": {name: description}}                          what it is made of

A part's arrays are called by its name, ``_`` and their own: ``0_left_packed`` are the codes of the left factor of a
product that is the first term of a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit import formats, layouts
from fewbit.containers.safetensors import DTYPES, NAMES
from fewbit.core.qtensor import QTensor, storage
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms
from fewbit.errors import CorruptFileError, InputError

Plain = Mapping[str, Any]
Weight = QTensor | Terms
"""What a layer multiplies by."""

KINDS: dict[type[Term], str] = {Product: "product", Sparse: "sparse", Columns: "columns", Terms: "sum"}


def dense(format: str, layout: str, shape: tuple[int, int]) -> Plain:
    """The description of one quantized matrix."""
    return {"kind": "dense", "format": format, "layout": layout, "shape": list(shape)}


def of_entry(entry: Plain) -> Plain:
    """The description of the weight of a layer, as configurations and manifests have it."""
    return entry["terms"] if "terms" in entry else dense(entry["format"], entry["layout"], tuple(entry["shape"]))


def describe(weight: QTensor | Term) -> Plain:
    """What of ``weight`` is no array, ready for JSON."""
    if isinstance(weight, QTensor):
        return dense(weight.format.name, weight.layout.name, weight.shape)
    if isinstance(weight, Dense):
        return describe(weight.qtensor)
    arrays = {name: [NAMES[array.dtype], list(array.shape)] for name, array in _own(weight).items()}
    parts = {name: describe(part) for name, part in _parts(weight).items()}
    return {"kind": KINDS[type(weight)], "shape": list(weight.shape), "arrays": arrays, "parts": parts}


def summary(plain: Plain) -> str:
    """The formats in it: ``int4/g64 + sparse``."""
    kind = str(plain["kind"])
    if kind == "dense":
        return str(plain["format"])
    inner = [summary(part) for part in plain["parts"].values()]
    return {"sum": " + ", "product": " times "}.get(kind, " | ").join(inner) or kind


def arrays(weight: QTensor | Term, plain: Plain) -> dict[str, Tensor]:
    """The arrays of ``weight`` by name, matrices in the layouts that ``plain``, its description, names."""
    if isinstance(weight, QTensor):
        stored = weight.repack(layouts.named(plain["layout"]))
        return {"packed": stored.packed, **stored.params}
    if isinstance(weight, Dense):
        return arrays(weight.qtensor, plain)
    found = _own(weight)
    for name, part in _parts(weight).items():
        found |= {f"{name}_{array}": tensor for array, tensor in arrays(part, plain["parts"][name]).items()}
    return found


def sizes(plain: Plain) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every array of the weight that ``plain`` describes.

    Raises:
        CorruptFileError: it describes none.
        SpecError, UnsupportedError: a format or layout is unknown, or the layout refuses.
    """
    try:
        if plain["kind"] == "dense":
            return storage(formats.parse(plain["format"]), layouts.named(plain["layout"]), _shape(plain))
        found = {name: (DTYPES[dtype], _naturals(size)) for name, (dtype, size) in plain["arrays"].items()}
        for name, part in plain["parts"].items():
            found |= {f"{name}_{array}": size for array, size in sizes(part).items()}
        return found
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _corrupt(plain) from None


def restore(plain: Plain, found: Mapping[str, Tensor]) -> Weight:
    """The weight that ``plain`` describes, of the arrays ``found``, whose dtypes and shapes are those of :func:`sizes`.

    Raises:
        CorruptFileError: the description is of no weight, an array is missing, or they contradict one another.
    """
    try:
        term = _restore(plain, found)
    except CorruptFileError:
        raise
    except InputError as error:
        raise CorruptFileError(error.asked, error.found, error.works) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _corrupt(plain) from None
    if isinstance(term, Dense):
        return term.qtensor
    if isinstance(term, Terms):
        return term
    raise _corrupt(plain)


def _restore(plain: Plain, found: Mapping[str, Tensor]) -> Term:
    shape, kind = _shape(plain), plain["kind"]
    if kind == "dense":
        params = dict(found)
        packed = params.pop("packed")
        return Dense(QTensor(formats.parse(plain["format"]), layouts.named(plain["layout"]), shape, packed, params))
    parts = {
        name: _restore(
            part, {key[len(name) + 1 :]: value for key, value in found.items() if key.startswith(f"{name}_")}
        )
        for name, part in plain["parts"].items()
    }
    own: dict[str, Tensor] = {name: found[name] for name in plain["arrays"]}
    term: Term
    if kind == "product":
        left, right = parts["left"], parts["right"]
        if not isinstance(left, Dense) or not isinstance(right, Dense):
            raise _corrupt(plain)
        term = Product(left.qtensor, own.get("middle"), right.qtensor)
    elif kind == "sparse":
        term = Sparse(shape, own["pointers"], own["columns"], own["values"])
    elif kind == "columns":
        term = Columns(own["permutation"], tuple(parts[str(i)] for i in range(len(parts))))
    elif kind == "sum":
        terms = tuple(parts[str(i)] for i in range(len(parts)))
        term = Terms(shape, terms, own.get("row_scale"), own.get("column_scale"))
    else:
        raise _corrupt(plain)
    if term.shape != shape:
        raise _corrupt(plain)
    return term


def _own(term: Term) -> dict[str, Tensor]:
    """Arrays that are no part's."""
    match term:
        case Product():
            own = {"middle": term.middle}
        case Sparse():
            own = {"pointers": term.pointers, "columns": term.columns, "values": term.values}
        case Columns():
            own = {"permutation": term.permutation}
        case Terms():
            own = {"row_scale": term.row_scale, "column_scale": term.column_scale}
        case _:
            raise TypeError(f"{type(term).__name__} is no term")
    return {name: array for name, array in own.items() if array is not None}


def _parts(term: Term) -> dict[str, Term]:
    match term:
        case Product():
            return {"left": Dense(term.left), "right": Dense(term.right)}
        case Columns():
            return {str(i): part for i, part in enumerate(term.parts)}
        case Terms():
            return {str(i): part for i, part in enumerate(term.terms)}
    return {}


def _shape(plain: Plain) -> tuple[int, int]:
    rows, columns = _naturals(plain["shape"])
    return rows, columns


def _naturals(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError
    return tuple(values)


def _corrupt(plain: Any) -> CorruptFileError:
    return CorruptFileError("the description of a weight", f"found {str(plain)[:200]}", "quantize again")
