# SPDX-License-Identifier: Apache-2.0
"""What the field calls its schemes, and which formats they are.

``WxAy`` is x bits a weight and y bits an activation, 16 meaning float. Groups follow the presets of compressed-tensors:
128 columns, but a whole row for W8A8, and for W1A1 (signs times signs, XNOR-Net). Activations have one scale a token,
found as they arrive: the format of a (tokens, features) matrix with whole rows. ``_G64``: one for 64 of its columns.
``_STATIC``: all tokens of a layer share one grid, found by calibration. ``_TENSOR``: one scale for the matrix, and one
for all activations of a call. ``LLM_INT8``: activations of 6 and more stay
float. ggml's type names stand for the formats that those types store.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.core import given
from fewbit.errors import SpecError


@dataclass(frozen=True)
class Scheme:
    """Spelt formats of the weight and, unless activations stay float, of the activations."""

    weight: str
    activation: str | None = None


_TOKEN = "int8/channel/sym"
_STATIC = "int8/static/asym/mse"

SCHEMES: dict[str, Scheme] = {
    **{f"W{bits}A16": Scheme(f"int{bits}/g128/sym") for bits in range(1, 9)},
    **{f"W{bits}A16_ASYM": Scheme(f"int{bits}/g128/asym") for bits in range(1, 9)},
    **{f"W{bits}A8": Scheme(f"int{bits}/g128/sym", _TOKEN) for bits in range(1, 8)},
    "W4A4": Scheme("int4/g128/sym", "int4/channel/sym/clip0.9"),
    **{f"W{bits}A8_STATIC": Scheme(f"int{bits}/g128/sym", _STATIC) for bits in range(1, 8)},
    "W8A8": Scheme("int8/channel/sym", _TOKEN),
    "W8A8_G64": Scheme("int8/channel/sym", "int8/g64/sym"),
    "W8A8_STATIC": Scheme("int8/channel/sym", _STATIC),
    "W8A8_TENSOR": Scheme("int8/tensor/sym", "int8/tensor/sym"),
    "LLM_INT8": Scheme("int8/channel/sym", "int8/channel/outliers6"),
    "INT8": Scheme("int8/channel/sym", _TOKEN),
    "W1A1": Scheme("sign/channel", "sign/channel"),
    "MXFP4A16": Scheme("mxfp4"),
    "NVFP4A16": Scheme("nvfp4"),
    "Q4_0": Scheme("int4/g32/sym"),
    "Q4_1": Scheme("int4/g32/min"),
    "Q8_0": Scheme("int8/g32/sym"),
    "Q4_K": Scheme("int4/g32x8/asym/s6"),
    "Q6_K": Scheme("int6/g16x16/sym/s8"),
    "TQ1_0": Scheme("ternary/g256"),
    "TQ2_0": Scheme("ternary/g256"),
}


def scheme(text: str) -> Scheme:
    """The scheme called ``text``, in any case.

    >>> scheme("w4a16")
    Scheme(weight='int4/g128/sym', activation=None)

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    given.kind("a scheme", text, str, "its name, for example 'W4A16'")
    found = SCHEMES.get(text.strip().upper())
    if found is None:
        raise SpecError(f"scheme {text!r}", "no such scheme", f"schemes are {', '.join(SCHEMES)}")
    return found
