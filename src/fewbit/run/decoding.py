# SPDX-License-Identifier: Apache-2.0
"""A quantized folder as a float model: weights put in place decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.containers.files import INDEX, read_json
from fewbit.model.stream import StreamedModel
from fewbit.run.solve import Solved
from fewbit.run.verify import read_back, read_rewrite


def decode_into(streamed: StreamedModel, folder: Path, layers: list[dict[str, Any]]) -> list[Solved]:
    """Put what ``folder`` decodes to, for the records ``layers`` of its manifest, into the loaded sites of ``streamed``
    and those tied to them. What is returned rounds its inputs, and is to run so: ``fewbit.run.rewriting.as_run``."""
    rounding = []
    where = read_json(folder / INDEX)["weight_map"]
    for record in layers:
        path = folder / next(file for key, file in where.items() if key.startswith(f"{record['name']}.weight_"))
        item = Solved(read_back(path, record), record, read_rewrite(path, record))
        values = item.weight.dequantize()
        if item.activation is None:
            values = item.rewrite.unweight(values)
        else:
            rounding.append(item)
        for site in streamed.sites:
            if record["name"] in (site.name, site.tied_to):
                streamed.set_weight(site.name, values.reshape(streamed.weight(site.name).shape))
    return rounding
