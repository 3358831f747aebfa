# SPDX-License-Identifier: Apache-2.0
"""What commands that write text do about images, with which the next start takes a fraction of the time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.commands.saying import note
from fewbit.decode.native_engine import NativeEngine
from fewbit.errors import FewbitError
from fewbit.report import numbers as N

if TYPE_CHECKING:
    from fewbit.decode.engine import Engine


def keep(engine: Engine, folder: Path, activation: str | None) -> None:
    """Write an image of the model of ``engine`` into ``folder``, unless it came from one, and say where and how large;
    or why not, which is no error."""
    if not isinstance(engine, NativeEngine) or engine.model.image is not None:
        return
    from fewbit.decode import image

    try:
        path, nbytes = image.write(engine.model, folder, activation)
    except FewbitError as error:
        note(f"note: every start repacks the model: {error}")
        return
    what = f"{path} ({N.size(nbytes)})"
    note(f"kept for faster starts: {what}; deleting it loses nothing, --no-image keeps none")
