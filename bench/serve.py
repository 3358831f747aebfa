# SPDX-License-Identifier: Apache-2.0
"""Does ``fewbit serve`` survive its clients? 50 of them at once, reading, pausing, leaving and sending nonsense.

``python bench/serve.py OUT [--clients 50] [--seconds 300] [--sequences 8] [--threads 1] [--activation int8/g64]
[--json FILE]``

The server is a process of its own on a free port of loopback. First every request is made alone, then all clients make
them again at random, and every text must be the one that its request got alone: the native runtime's logits do not
depend on what runs beside them (those of transformers do). In half of the requests a bias makes each write a token of
its own over and over, so that no two texts are alike. Memory of the server is read twice a second; "growth" is its
median over the last quarter of the time less that over the second: the first fills caches. Exits with 1 if an answer
was wrong or lost, or a text outlived its client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from storm import Case, Server, Tally, answer, storm

BEGINNINGS = (
    "Once upon a time, there was a little girl named Lily. She liked to",
    "One day, a boy named Tim went to the park with his mother. He saw a",
    "Tom and Sue are friends. They play in the garden. They find a big",
    "The old dog was tired. He had walked all day, and",
)
TOKENS = (4, 12, 32)
FIRST_MARK = 1000
"""A token; those before it are often bytes or special."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--activation")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    command = [sys.executable, "-m", "fewbit", "serve", str(asked.folder), "--port", "0", "--name", "model"]
    command += ["--sequences", str(asked.sequences), "--threads", str(asked.threads)]
    command += ["--activation", asked.activation] if asked.activation else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r":(\d+)/#token=(\S+)", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            server = Server(int(found[1]), found[2])
            result = asyncio.run(measure(server, psutil.Process(process.pid), asked.clients, asked.seconds))
        finally:
            process.terminate()
    show(result)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(1 if result["wrong"] or result["left_over"] else 0)


async def measure(server: Server, process: psutil.Process, clients: int, seconds: float) -> dict[str, Any]:
    """What the storm brought, beside the memory of ``process``."""
    cases = [Case(body, await answer(server, body)) for body in requests()]
    memory: list[int] = []

    async def watch() -> None:
        while True:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    before, began = metrics(server), time.monotonic()
    tally = await storm(server, cases, clients, seconds)
    took = time.monotonic() - began
    after = metrics(server)
    watching.cancel()
    await asyncio.sleep(1)
    end = metrics(server)
    made = {name: after[name] - before[name] for name in after if name.endswith("_total")}
    return {**summary(tally, made, took), **growth(memory), "left_over": end["fewbit_running"] + end["fewbit_waiting"]}


def requests() -> list[dict[str, Any]]:
    free = [
        {"model": "model", "prompt": beginning, "max_tokens": tokens, "temperature": temperature, "seed": 7}
        for beginning in BEGINNINGS
        for tokens in TOKENS
        for temperature in (0, 1)
    ]
    marked = [{**body, "logit_bias": {str(FIRST_MARK + 37 * number): 100}} for number, body in enumerate(free)]
    return free + marked


def metrics(server: Server) -> dict[str, float]:
    """The numbers of /metrics that have no labels."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics")
    request.add_header("Authorization", f"Bearer {server.token}")
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name.isidentifier()}


def summary(tally: Tally, made: dict[str, float], seconds: float) -> dict[str, Any]:
    first = sorted(tally.first) or [float("nan")]
    return {
        "seconds": seconds,
        "requests": sum(tally.ways.values()),
        "ways": dict(tally.ways),
        "busy": tally.busy,
        "wrong": tally.wrong,
        "read": tally.read,
        "other": tally.other,
        "tokens_per_s": made["fewbit_generated_tokens_total"] / seconds,
        "prompt_tokens_per_s": made["fewbit_prompt_tokens_total"] / seconds,
        "reused": made["fewbit_reused_tokens_total"] / max(made["fewbit_prompt_tokens_total"], 1),
        "first_token_s": statistics.median(first),
        "first_token_p99_s": first[int(0.99 * (len(first) - 1))],
    }


def growth(memory: list[int]) -> dict[str, int]:
    quarter = max(len(memory) // 4, 1)
    early, late = memory[quarter : 2 * quarter] or memory, memory[-quarter:]
    grown = round(statistics.median(late) - statistics.median(early))
    return {"rss_bytes": max(memory), "rss_first": memory[0], "rss_last": memory[-1], "growth_bytes": grown}


def show(found: dict[str, Any]) -> None:
    table = Table("what", "found", title="fewbit serve and its clients", title_justify="left")
    memory = [found[name] / 2**20 for name in ("rss_first", "rss_last", "rss_bytes", "growth_bytes")]
    ways = ", ".join(f"{count} {way}" for way, count in found["ways"].items())
    for name, value in (
        ("requests", f"{found['requests']} in {found['seconds']:.0f} s: {ways}"),
        ("wrong or lost", str(len(found["wrong"]))),
        ("came out otherwise", f"{found['other']} of {found['read']} that were compared"),
        ("told to try later", str(found["busy"])),
        ("written", f"{found['tokens_per_s']:.0f} tokens/s"),
        ("prompts", f"{found['prompt_tokens_per_s']:.0f} tokens/s, {100 * found['reused']:.0f} % of them reused"),
        ("first token", f"{found['first_token_s']:.2f} s in the middle, {found['first_token_p99_s']:.2f} s for 1 %"),
        ("memory", "{:.0f} MiB first, {:.0f} last, {:.0f} at most, growth {:+.1f}".format(*memory)),
        ("texts that outlived their clients", f"{found['left_over']:.0f}"),
    ):
        table.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for line in found["wrong"][:20]:
        print(line)


if __name__ == "__main__":
    main()
