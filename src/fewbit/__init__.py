# SPDX-License-Identifier: Apache-2.0
"""fewbit: neural networks in few bits, with the cost in accuracy proved and the gain in size and speed measured.

>>> import fewbit, torch
>>> weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
>>> q = fewbit.methods.rtn(weight, fewbit.formats.parse("int3/g64"))
>>> q.repack(fewbit.layouts.named("dense")).bits_per_weight
3.25
>>> fewbit.linear(torch.ones(1, 128), q).shape
torch.Size([1, 64])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import fewbit_autoload
from fewbit.errors import FewbitError
from fewbit.later import later

if TYPE_CHECKING:
    from fewbit import formats, kernels, layouts, methods, network, transforms
    from fewbit.core.facts import Facts
    from fewbit.core.qtensor import QTensor
    from fewbit.decode.sampling import Sampling
    from fewbit.decode.writer import generate
    from fewbit.evaluation import evaluate
    from fewbit.integrations.load import load
    from fewbit.kernels.ops import linear
    from fewbit.recipe import Recipe
    from fewbit.run import plan, quantize
    from fewbit.run.collecting import collect
    from fewbit.run.restoring import restore
    from fewbit.run.telling import tell
    from fewbit.search import allocate

__version__ = "0.1.0"

_LATER = {
    "Facts": "fewbit.core.facts",
    "QTensor": "fewbit.core.qtensor",
    "Recipe": "fewbit.recipe",
    "Sampling": "fewbit.decode.sampling",
    "allocate": "fewbit.search",
    "collect": "fewbit.run.collecting",
    "evaluate": "fewbit.evaluation",
    "generate": "fewbit.decode.writer",
    "linear": "fewbit.kernels.ops",
    "load": "fewbit.integrations.load",
    "plan": "fewbit.run",
    "quantize": "fewbit.run",
    "restore": "fewbit.run.restoring",
    "tell": "fewbit.run.telling",
} | {name: f"fewbit.{name}" for name in ("formats", "kernels", "layouts", "methods", "network", "transforms")}
"""Names whose modules import torch or transformers: loaded at first use."""
__getattr__ = later(__name__, _LATER)

fewbit_autoload.install()

__all__ = [
    "Facts",
    "FewbitError",
    "QTensor",
    "Recipe",
    "Sampling",
    "allocate",
    "collect",
    "evaluate",
    "formats",
    "generate",
    "kernels",
    "layouts",
    "linear",
    "load",
    "methods",
    "network",
    "plan",
    "quantize",
    "restore",
    "tell",
    "transforms",
]
