# SPDX-License-Identifier: Apache-2.0
"""A model as the native runtime sees it: the structs of ``fewbit_decode.h``, filled from a source's arrays."""

from __future__ import annotations

import ctypes as C

from fewbit.decode import structs as S
from fewbit.decode.families import Layer, Shape
from fewbit.decode.source import Source
from fewbit.decode.weights import LOOKED_UP
from fewbit.kernels import native


def describe(shape: Shape, source: Source) -> S.Model:
    """The struct of the model; it and all that it points to live as long as ``source``.

    Raises:
        UnsupportedError: a matrix that no native kernel runs. CorruptFileError: an array is missing or wrong.
    """
    head = "model.embed_tokens"
    if source.has("lm_head") and not source.modules.get("lm_head", {}).get("tied_to"):
        head = "lm_head"
    # The largest come first: what they take for the moment of being repacked is not on top of all others.
    tied = head == "model.embed_tokens"
    last = source.weight(head)
    alike = tied and last.kind in LOOKED_UP
    ends = last if alike else source.weight("model.embed_tokens", rounded=False), last
    ropes = (S.Rope * len(shape.ropes))()
    for place, rope in enumerate(shape.ropes):
        ropes[place] = S.Rope(rope.frequencies.numel(), source.keep(rope.frequencies), rope.scale)
    blocks = (S.Block * len(shape.layers))()
    for place, layer in enumerate(shape.layers):
        _fill(blocks[place], shape, layer, source, f"model.layers.{place}")
    model = S.Model(
        C.sizeof(S.Model),
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.vocabulary,
        len(shape.layers),
        len(shape.ropes),
        shape.experts_per_token,
        shape.eps,
        shape.query_scale,
        shape.attention_cap,
        shape.logit_cap,
        1.0,
        shape.embedding_scale,
        shape.activation,
        native.FLAGS[native.isas()[0]],
        ropes,
        blocks,
        source.vector("model.norm.weight", shape.family.norm_offset),
        *ends,
    )
    source.kept += [ropes, blocks, model]
    return model


def _fill(block: S.Block, shape: Shape, layer: Layer, source: Source, path: str) -> None:
    offset = shape.family.norm_offset
    members = ("norm", "norm_after", "mlp_norm", "mlp_norm_after")
    for member, name in zip(members, shape.family.norms, strict=True):
        if name is not None:
            setattr(block, member, source.vector(f"{path}.{name}.weight", offset))
    attention = f"{path}.self_attn"
    if shape.family.head_norms:
        block.q_norm = source.vector(f"{attention}.q_norm.weight", offset)
        block.k_norm = source.vector(f"{attention}.k_norm.weight", offset)
    for member in ("q", "k", "v", "o"):
        setattr(block, member, source.weight(f"{attention}.{member}_proj"))
    block.window, block.rope, block.experts = layer.window, layer.rope, layer.experts
    if not layer.experts:
        block.mlp = _mlp(source, f"{path}.mlp")
        return
    block.normalise = int(shape.normalised)
    block.router = source.weight(f"{path}.mlp.gate", rounded=False)
    experts = (S.Mlp * layer.experts)()
    pairs = zip(
        source.experts(f"{path}.mlp.experts.gate_up_proj", layer.experts),
        source.experts(f"{path}.mlp.experts.down_proj", layer.experts),
        strict=True,
    )
    for place, (both, down) in enumerate(pairs):
        experts[place] = S.Mlp(both, S.Weight(), down)
    source.kept.append(experts)
    block.expert = C.cast(experts, C.POINTER(S.Mlp))
    if source.has(f"{path}.mlp.shared_expert.gate_proj"):
        block.mlp = _mlp(source, f"{path}.mlp.shared_expert")
        block.shared_gate = source.weight(f"{path}.mlp.shared_expert_gate", rounded=False)


def _mlp(source: Source, path: str) -> S.Mlp:
    return S.Mlp(*(source.weight(f"{path}.{name}") for name in ("gate_proj", "up_proj", "down_proj")))
