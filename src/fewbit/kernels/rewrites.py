# SPDX-License-Identifier: Apache-2.0
"""What inputs of a layer go through, computed by the core: sums and differences in place of products with matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.orders import paley
from fewbit.core.rewrite import Chain, Scale, Step
from fewbit.kernels import native
from fewbit.kernels.inputs import wants_gradients


def lowered(step: Step) -> tuple[Tensor, int, Tensor | None, int]:
    """``step`` as the core takes it: what each column is multiplied by, the order of Sylvester's matrix, Paley's where
    there is one, and its order; all float32."""
    if isinstance(step, Scale):
        return step.scale.float().contiguous(), 1, None, 1
    matrix = paley(step.order).float().contiguous() if step.order > 1 else None
    return step.factors.float().contiguous(), step.block, matrix, step.order


class Rewriting:
    """``chain`` ready to run: ``rewriting(x)`` is ``chain.apply(x)`` within the error of float32.

    torch computes it where the core cannot: gradients are wanted, x is float64 or on another device, or the core is
    absent; and where no step mixes columns, which leaves nothing to gain.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._steps = [lowered(step) for step in chain.steps]
        self._mixes = any(step.mixes for step in chain.steps)

    def __call__(self, x: Tensor) -> Tensor:
        known = x.is_cpu and x.dtype in native.DTYPES
        if not self._mixes or not known or not x.numel() or wants_gradients(x) or not native.available():
            return self.chain.apply(x)
        flat = x.resolve_neg().float().reshape(-1, x.shape[-1]).contiguous()
        out, (tokens, columns) = torch.empty_like(flat), flat.shape
        steps = tuple(
            (factor.data_ptr(), block, 0 if matrix is None else matrix.data_ptr(), order)
            for factor, block, matrix, order in self._steps
        )
        isa, threads = native.FLAGS[native.isas()[0]], torch.get_num_threads()
        native.core().rewrite(steps, flat.data_ptr(), tokens, columns, out.data_ptr(), isa, threads)
        return out.reshape(x.shape)
