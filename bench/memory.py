# SPDX-License-Identifier: Apache-2.0
"""Does a model larger than memory get through? One command, run it under the limit that you want to see held.

    python bench/memory.py make FOLDER --gigabytes 4.5
    systemd-run --scope -p MemoryMax=1500M -p MemorySwapMax=0 python bench/memory.py run FOLDER
    python bench/memory.py generate OUT [--prompt FILE --characters 8000]
    python bench/memory.py serve OUT

``make`` writes a random Llama in float32, shard by shard; ``run`` quantizes it with GPTQ and prints its size, the peak
memory of the process, and the limit of its cgroup when there is one. ``generate`` lets ``fewbit generate`` add two
tokens with what ``fewbit quantize`` wrote, once to make the image and once from it, and prints the peak of the second
and its processor time. ``serve`` starts ``fewbit serve`` with an image and prints what it holds beside the pages of the
image, and keys and values, in all of its processes, each page of a file counted once: before its first request, after a
completion with logarithms of probabilities, after a chat, for which a process of its own renders the template, and when
that has ended. What it adds is printed too.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import fewbit
from fewbit.containers.safetensors import write_safetensors
from fewbit.decode.templates import IDLE
from fewbit.measure.memory import peak_rss_bytes

HIDDEN, INTERMEDIATE, HEADS = 1024, 2816, 16
WATCHED = """
import atexit, sys
from fewbit.cli import main
from fewbit.decode.native_engine import NativeEngine
from fewbit.measure.memory import peak_rss_bytes
closed = NativeEngine.close
def close(self, sequence):
    print("cache", self.length(sequence), self.nbytes(), file=sys.stderr)
    closed(self, sequence)
NativeEngine.close = close
atexit.register(lambda: print("peak", peak_rss_bytes(), file=sys.stderr))
main()
"""
"""A ``fewbit`` that says at its end how much memory it had, and how much of it keys and values were."""


def block(index: int, random: torch.Generator) -> dict[str, torch.Tensor]:
    """The weights of one block, about 51 MB."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * columns**-0.5

    prefix = f"model.layers.{index}"
    tensors = {f"{prefix}.self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qkvo"}
    tensors |= {f"{prefix}.mlp.{name}_proj.weight": matrix(INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE) * 0.1
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN)
    return tensors


def make(folder: Path, gigabytes: float) -> None:
    """Write the checkpoint: one shard a block, so that making it takes no more memory than a block either."""
    folder.mkdir(parents=True)
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    size = sum(tensor.nbytes for tensor in block(0, random).values())
    blocks = int(gigabytes * 1e9 / size)
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    config.save_pretrained(folder)
    where = {}
    for index in range(blocks + 1):
        rest = {
            "model.embed_tokens.weight": torch.randn(len(symbols), HIDDEN, generator=random),
            "model.norm.weight": torch.ones(HIDDEN),
        }
        tensors = block(index, random) if index < blocks else rest
        name = f"model-{index:05d}.safetensors"
        write_safetensors(folder / name, tensors, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    print(f"{blocks} blocks, {blocks * size / 1e9:.2f} GB")


def limit() -> str:
    """Memory limit of this process's cgroup, version 2 or 1."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    root = Path("/sys/fs/cgroup")
    files = (
        root / groups.get("", "/").lstrip("/") / "memory.max",
        root / "memory" / groups.get("memory", "/").lstrip("/") / "memory.limit_in_bytes",
    )
    return next((file.read_text().strip() for file in files if file.exists()), "unknown")


def run(folder: Path, samples: int, context: int) -> None:
    """Quantize under whatever limit holds."""
    out = folder.with_name(folder.name + "-quantized")
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    result = fewbit.quantize(
        folder, "int4/g64/asym", method="gptq", out=out, samples=samples, context=context, force=True, threads=2
    )
    source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    peak = peak_rss_bytes()
    row = {
        "source_bytes": source,
        "result_bytes": result.manifest["size_bytes"],
        "peak_rss_bytes": peak,
        "source_over_peak": round(source / peak, 2),
        "cgroup_memory_max": limit(),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(row, indent=1))


def generate(folder: Path, prompt: str) -> None:
    """The peak of a process that writes two tokens after ``prompt``, beside the image that it maps."""
    command = [sys.executable, "-c", WATCHED, "generate", str(folder), "--prompt", prompt, "-n", "2"]
    command += ["--threads", "1", "--activation", "int8/channel"]
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = int(re.findall(r"^peak (\d+)$", ended.stderr, re.MULTILINE)[-1])
    image = max((folder / ".fewbit").glob("engine-int8-channel-*.bin"), key=lambda path: path.stat().st_mtime)
    size = image.stat().st_size
    positions, cache = map(int, re.findall(r"^cache (\d+) (\d+)$", ended.stderr, re.MULTILINE)[-1])
    sizes = {"peak": peak, "image": size, "beside_it": peak - size, "cache": cache, "beside_both": peak - size - cache}
    row = {f"{name}_MiB": round(value / 2**20, 1) for name, value in sizes.items()}
    print(json.dumps(row | {"positions": positions, "processor_s": round(seconds, 2)}))


class Server:
    """``fewbit serve`` on ``folder``, until it is closed."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "fewbit", "serve", str(folder), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        found = re.fullmatch(r"(.+) at (\S+)/#token=(\S+)\n", self.process.stdout.readline())
        assert found is not None, "the server did not start"
        self.name, self.url, self.token = found.groups()

    def ask(self, path: str, body: dict[str, object] | None = None) -> str:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps({"model": self.name, **body}).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as answer:
            return answer.read().decode()

    def held(self) -> dict[str, float]:
        """MiB that are resident beside pages of the image, and beside keys and values."""
        cache = float(re.findall(r"^fewbit_cache_bytes (\S+)$", self.ask("/metrics"), re.MULTILINE)[0])
        parents = [self.process.pid]
        pages = resident_of_all(parents + [child.pid for child in self.children()])
        image = sum(size for name, size in pages.items() if ".fewbit" in name)
        sizes = {"image": image, "cache": cache, "beside_both": sum(pages.values()) - image - cache}
        sizes["of_it_children"] = sum(pages.values()) - sum(resident_of_all(parents).values())
        return {f"{name}_MiB": round(size / 2**20, 1) for name, size in sizes.items()}

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


def resident(process: int, kind: str) -> Counter[str]:
    """Bytes by the name of what is mapped. ``kind``: "Rss", or "Private_Dirty" for those that nobody shares."""
    sizes: Counter[str] = Counter()
    name = ""
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        word, *rest = line.split(maxsplit=5)
        if not word.endswith(":"):
            name = rest[4] if len(rest) > 4 else ""
        elif word == f"{kind}:":
            sizes[name] += 1024 * int(rest[0])
    return sizes


def resident_of_all(processes: list[int]) -> Counter[str]:
    """Resident bytes by the name of what is mapped. Pages that processes may share are counted once, as many as the one
    has that has most of them."""
    sizes: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for process in processes:
        own = resident(process, "Private_Dirty")
        sizes += own
        shared |= resident(process, "Rss") - own
    return sizes + shared


def serve(folder: Path) -> None:
    """What a server holds at rest and after use."""
    Server(folder).close()  # which makes the image where there is none
    server = Server(folder)
    rows = {"at rest": server.held()}
    server.ask("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 100, "logprobs": 5})
    rows["after a completion"] = server.held()
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        message = {"role": "user", "content": "Why is the sky blue?"}
        server.ask("/v1/chat/completions", {"messages": [message], "max_tokens": 100})
        rows["after a chat"] = server.held()
        until = time.monotonic() + 2 * IDLE
        while server.children() and time.monotonic() < until:
            time.sleep(1)
        rows["when idle again"] = server.held()
    server.close()
    print(json.dumps(rows, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("make", "run", "generate", "serve"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompt", type=Path, help="a file of text that generate begins with (some words without)")
    parser.add_argument("--characters", type=int, default=8000, help="of that file")
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.folder, arguments.gigabytes)
    elif arguments.what == "generate":
        text = arguments.prompt.read_text()[: arguments.characters] if arguments.prompt else "Once upon"
        generate(arguments.folder, text)
    elif arguments.what == "serve":
        serve(arguments.folder)
    else:
        run(arguments.folder, arguments.samples, arguments.context)


if __name__ == "__main__":
    main()
