# SPDX-License-Identifier: Apache-2.0
"""Writes formats.md, layouts.md, methods.md and transforms.md from the tables in the code: ``python docs/generate.py``.

``python docs/generate.py --check`` writes nothing and fails when a page is out of date; a test does the same.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fewbit import formats, layouts, methods, transforms
from fewbit.core import rewrite
from fewbit.core.format import Format, Param
from fewbit.core.qtensor import storage, storage_bytes
from fewbit.formats import grammar
from fewbit.run.solve import layout_for
from fewbit.transforms import quarot, spinquant

HERE = Path(__file__).parent
SHAPE = (4096, 4096)
NOTICE = "<!-- Written by docs/generate.py from the tables in the code; do not edit. -->"
SHOWN = 6
UNPACKED = "A byte a code (four above 8 bits), parameters as they are: what methods return, before a layout is chosen."
CHOICES = (
    ("next to no loss, without data", "int8/channel"),
    ("4 bits, the usual", "int4/g128/asym"),
    ("4 bits, less loss", "int4/g64/asym"),
    ("4 bits of bitsandbytes and of ggml", "nf4/g64/dq", "Q4_K"),
    ("3 bits", "int3/g64/asym", "palette3/row"),
    ("2 bits", "vector4x8", "int2/g64/asym"),
    ("less, where the model bears it", "ternary/g128", "sign/channel"),
    ("4-bit floats of accelerators", "mxfp4", "nvfp4"),
)
NEEDS = {
    "nothing": "no data",
    "largest": "max|x| of each input",
    "mean_square": "E[x^2] of each input",
    "fisher": "Fisher diagonal of the weight, by a backward pass",
    "gram": "E[x x^T] of the inputs",
}


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def first_sentence(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def summary(thing: object) -> str:
    """The first paragraph of the docstring of the module that defines ``thing``, partials looked through."""
    thing = thing.func if isinstance(thing, functools.partial) else thing
    return first_sentence(inspect.getmodule(thing)).rstrip(":")


def formats_page() -> str:
    """Every kind of format, with the bytes it really takes."""
    rows = []
    for name in formats.EXAMPLES:
        format = formats.parse(name)
        stored = "; ".join(described(format, param) for param in format.params) or "nothing"
        whole = "tensor" if all(param.shared for param in format.params) else some_rows(format)
        rows.append((f"`{name}`", format.levels, format.block or whole, stored, true_bits(format)))
    kinds = {type(formats.parse(name)): None for name in formats.EXAMPLES}
    about = "\n".join(f"- **{kind.__name__}**: {summary(kind)}" for kind in kinds)
    schemes = table(
        ("scheme", "weights", "activations"),
        [
            (f"`{name}`", f"`{s.weight}`", f"`{s.activation}`" if s.activation else "float")
            for name, s in formats.SCHEMES.items()
        ],
    )
    choices = [
        (want, ", ".join(f"`{name}` ({true_bits(formats.parse(name))})" for name in names)) for want, *names in CHOICES
    ]
    spellings = [(f"`{spelling}`", means) for spelling, means in grammar.GRAMMAR]
    return "\n\n".join(
        (
            NOTICE,
            "# Formats",
            "A format says which values exist: `--format` on the command line, `format` in a recipe.",
            "## Which one",
            "With true bits per weight, of a 4096 x 4096 matrix. What they cost: [accuracy](accuracy.md). How fast "
            "they run: [kernels](kernels.md).",
            table(("for", "take"), choices),
            "## Spelling",
            "`fewbit.formats.parse(text)` reads a spelling:",
            table(
                ("spelling", "what it means"),
                [*spellings, ("`W4A16`, `Q4_K`, ...", "a scheme that leaves activations alone")],
            ),
            "## Kinds",
            about,
            "## True bits",
            "True bits per weight: 8 x stored bytes of a 4096 x 4096 matrix, codes and parameters, over its weights.",
            table(("format", "levels", "block", "stored beside the codes", "true bits"), rows),
            "## Schemes",
            "Names of the field that are understood wherever a format is:",
            schemes,
        )
    )


def some_rows(format: Format) -> str:
    """The rows that have parameters in common."""
    return f"{format.group_rows} rows" if format.group_rows > 1 else "row"


def described(format: Format, param: Param) -> str:
    """A parameter, its bits, and how many there are of it."""
    per = {
        "columns": "block of columns",
        "rows": "row" if format.group_rows == 1 else f"group of {some_rows(format)}",
    }.get(param.per, param.per)
    numbers = " x ".join(map(str, param.entry))
    return f"{param.name} {f'{numbers} x ' if numbers else ''}{param.bits} bits a {per}"


def true_bits(format: Format) -> str:
    """Stored bits per weight in the layout that `fewbit quantize` chooses."""
    return f"{8 * storage_bytes(storage(format, layout_for(format), SHAPE)) / (SHAPE[0] * SHAPE[1]):.4g}"


def layouts_page() -> str:
    """Every layout, what it is and which formats it holds."""
    spellings = list(dict.fromkeys([*formats.EXAMPLES, *(scheme.weight for scheme in formats.SCHEMES.values())]))
    rows = []
    for layout in layouts.LAYOUTS:
        held = [name for name in spellings if layout.refuse(formats.parse(name), SHAPE) is None]
        some = "every format" if len(held) == len(spellings) else ", ".join(f"`{name}`" for name in held[:SHOWN])
        rest = f" and {len(held) - SHOWN} more" if SHOWN < len(held) < len(spellings) else ""
        about = UNPACKED if layout is layouts.UNPACKED else summary(layout.pack)
        rows.append((f"`{layout.name}`", about, some + rest))
    return "\n\n".join(
        (
            NOTICE,
            "# Layouts",
            "A layout says where the bits lie. It is a bijection: packing and unpacking change no bit, and converting "
            "from one to another fits nothing again. Each module's docstring draws the bytes.",
            table(("layout", "what it is", "holds"), rows),
        )
    )


def methods_page() -> str:
    """Every method, what it needs and its options."""
    rows = []
    for method in methods.METHODS:
        options = ", ".join(f"`{name}={value}`" for name, value in method.options.items()) or "none"
        page = f"[{method.name}](methods/{method.name}.md)"
        needs = "no facts; text for its tuning" if method.tuning else NEEDS[method.needs]
        rows.append((page, summary(method.solve), needs, options, method.source))
    return "\n\n".join(
        (
            NOTICE,
            "# Methods",
            "A method chooses the codes. An option is `--option NAME=VALUE` on the command line, in a recipe "
            "`options = { NAME = VALUE }`, in Python as a keyword. Where the default is True or False, the command "
            "line takes true, yes, on, false, no and off, a recipe true and false. The plan refuses what is out of "
            "range.",
            table(("method", "what it does", "needs", "options and defaults", "source"), rows),
        )
    )


def transforms_page() -> str:
    """Every transform, what it needs and stores."""
    rows = []
    for row in transforms.TRANSFORMS:
        options = ", ".join(f"`{name}={value}`" for name, value in row.options.items()) or "none"
        page = f"[{row.name}](transforms/{row.name}.md)"
        bits = 8 * storage_bytes(rewrite.storage([row.makes], SHAPE[1])) / SHAPE[1]
        stored = f"{row.makes}: {bits:g} bit{'' if bits == 1 else 's'} an input"
        rows.append((page, summary(row.fit), NEEDS[row.needs], stored, options, row.source))
    return "\n\n".join(
        (
            NOTICE,
            "# Transforms",
            "A transform rewrites the inputs of a layer and undoes that in its weight before the method chooses codes: "
            "without quantizing, the output would stay what it was. `--transform NAME` on the command line, or with "
            'options `--transform "smooth alpha=0.7"`, more than once to do several in order; in a recipe '
            '`transforms = ["smooth"]`, or with options '
            '`transforms = [{ name = "smooth", alpha = 0.7 }]`; in Python `transforms=[...]`.',
            "Linear layers and a head that is not tied to the embedding can have them; experts and embeddings cannot, "
            "because nothing rewrites their inputs when the model runs: the plan refuses a rule that asks for it.",
            table(("transform", "what it does", "needs", "stores", "options and defaults", "source"), rows),
            "## Of the whole model",
            "These rotate the residual stream while the model is read: norms are folded into the matrices that read "
            "what they give, and the weights on both sides absorb the rotation, so nothing of it runs later but the "
            "rotation before down projections. `--transform NAME` as well; in a recipe, above its rules, "
            '`model = "quarot"` or `model = { name = "quarot", heads = 0 }`.',
            table(("transform", "what it does", "needs", "options and defaults", "source"), model_rows()),
        )
    )


def model_rows() -> list[tuple[str, str, str, str, str]]:
    """Every transform of the whole model."""
    about = {"quarot": quarot, "spinquant": spinquant}
    rows = []
    for row in transforms.MODEL_TRANSFORMS:
        options = ", ".join(f"`{name}={value:g}`" for name, value in row.options.items())
        does = first_sentence(about[row.name]).rstrip(":")
        needs = "text" if row.learns else NEEDS["nothing"]
        rows.append((f"[{row.name}](transforms/{row.name}.md)", does, needs, options, row.source))
    return rows


PAGES: dict[str, Callable[[], str]] = {
    "formats.md": formats_page,
    "layouts.md": layouts_page,
    "methods.md": methods_page,
    "transforms.md": transforms_page,
}


def stale() -> list[str]:
    """Pages whose file differs from what the tables say."""
    current = {name: (HERE / name).read_text(encoding="utf-8") if (HERE / name).is_file() else "" for name in PAGES}
    return [name for name, page in PAGES.items() if current[name] != page() + "\n"]


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        out_of_date = stale()
        print(f"out of date: {', '.join(out_of_date)}; run python docs/generate.py" if out_of_date else "up to date")
        return 1 if out_of_date else 0
    for name, page in PAGES.items():
        (HERE / name).write_text(page() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
