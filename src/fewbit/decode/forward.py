# SPDX-License-Identifier: Apache-2.0
"""Logits of whole windows from the native runtime, so that what is measured is what ``fewbit generate`` runs."""

from __future__ import annotations

from pathlib import Path

from fewbit.decode.engine import check_kv
from fewbit.decode.native_engine import NativeEngine
from fewbit.measure.forward import Forward


def native_forward(
    folder: Path | str, activation: str | None = None, kv: str = "float16", threads: int | None = None
) -> Forward:
    """Windows of the model in ``folder`` through the native runtime, for :func:`fewbit.evaluate`; arguments as of
    :func:`fewbit.decode.open_engine`.

    Raises:
        UnsupportedError: the machine, the family or a matrix is none that the runtime knows. SpecError: ``kv`` is none.
    """
    check_kv(kv)
    engine = NativeEngine.load(Path(folder), activation, kv, sequences=1, context=None, threads=threads)
    about = f"the native runtime, keys and values in {kv}"
    return Forward(about, engine.context, lambda ids: engine.every_logit(ids.tolist()))
