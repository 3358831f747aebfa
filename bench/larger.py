# SPDX-License-Identifier: Apache-2.0
"""A GGUF file with the shape of a larger model and random weights, to measure how fast such a model is decoded:

    python bench/larger.py SmolLM2-135M-Instruct.Q4_1.gguf larger.gguf --hidden 2048 --layers 16 --feed-forward 8192
    python bench/decode.py larger.gguf --work DIR --threads 1 --activation int8/channel --streams 8 --prompt 128

It says nothing of accuracy. Vocabulary, tokenizer and all else are those of the first file, a model of Llama's family.
Matrices are normal, scaled so that what enters a layer stays of one size; norms are ones. float16, on one seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

SEED = 0


def described(source: gguf.GGUFReader, writer: gguf.GGUFWriter, changed: dict[str, int]) -> None:
    """Copy what the file tells of the model, but what ``changed`` has."""
    for field in source.fields.values():
        if field.name in ("general.architecture", "general.file_type") or field.name.startswith("GGUF."):
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, changed.get(field.name, field.contents()), kind, sub_type=inner)


def matrices(arguments: argparse.Namespace, words: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name, (outputs, inputs); norms have one size. The head is the embedding."""
    hidden, inner = arguments.hidden, arguments.feed_forward
    narrow = hidden // arguments.heads * arguments.kv_heads
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (narrow, hidden),
        "attn_v": (narrow, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(arguments.layers) for name, shape in block.items()}
    return {"token_embd.weight": (words, hidden)} | blocks | {"output_norm.weight": (hidden,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("hidden", 2048), ("layers", 16), ("heads", 32), ("kv-heads", 8), ("feed-forward", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()

    source = gguf.GGUFReader(arguments.source)
    architecture = source.fields["general.architecture"].contents()
    changed = {
        "block_count": arguments.layers,
        "embedding_length": arguments.hidden,
        "feed_forward_length": arguments.feed_forward,
        "attention.head_count": arguments.heads,
        "attention.head_count_kv": arguments.kv_heads,
        "rope.dimension_count": arguments.hidden // arguments.heads,
    }
    writer = gguf.GGUFWriter(arguments.out, architecture)
    described(source, writer, {f"{architecture}.{name}": value for name, value in changed.items()})
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    words = next(int(t.shape[1]) for t in source.tensors if t.name == "token_embd.weight")
    random = np.random.default_rng(SEED)
    for name, shape in matrices(arguments, words).items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        scale = np.float32(shape[1] ** -0.5)
        writer.add_tensor(name, (random.standard_normal(shape, np.float32) * scale).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


if __name__ == "__main__":
    main()
