# SPDX-License-Identifier: Apache-2.0
"""Stories that a small language model tells, to calibrate it on what it knows.

    python bench/stories.py FOLDER stories.txt --number 400 --seed 1

Samples at temperature 1 from the beginning of a text, a story a paragraph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, TOKENS = 50, 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--number", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(arguments.model)
    torch.manual_seed(arguments.seed)
    start = torch.full((BATCH, 1), model.config.bos_token_id)
    stories: list[str] = []
    with torch.inference_mode():
        while len(stories) < arguments.number:
            ids = model.generate(
                start,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=TOKENS,
                pad_token_id=model.config.eos_token_id,
            )
            stories += (text.strip().replace("\n", " ") for text in words.batch_decode(ids, skip_special_tokens=True))
            print(f"{len(stories)} of {arguments.number}", flush=True)
    arguments.out.write_text("\n\n".join(stories[: arguments.number]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
