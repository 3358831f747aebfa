# SPDX-License-Identifier: Apache-2.0
"""Many texts at once: each is what it would be alone, and nothing that happens to one happens to another."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine

from fewbit.decode import batch
from fewbit.decode.batch import Batcher, Busy, Limits, Stopped
from fewbit.decode.job import Job, Piece
from fewbit.decode.prefixes import Prefixes, shared
from fewbit.decode.sampling import Sampling, logprobs
from fewbit.decode.text import Words, words_of
from fewbit.errors import InputError, SpecError

NOT_ASCII = (0, 1, *range(96, 258))
"""Tokens of the byte tokenizer that are no letter of their own."""
GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[[Path], int]) -> Words:
    folder = tmp_path_factory.mktemp("words")
    byte_tokenizer(folder)
    return words_of(folder)


@pytest.fixture
def batcher(words: Words) -> Iterator[Callable[..., Batcher]]:
    made: list[Batcher] = []

    def make(limits: Limits | None = None, **engine: Any) -> Batcher:
        made.append(Batcher(FakeEngine(**engine), words, limits or Limits()))
        return made[-1]

    yield make
    for one in made:
        one.close()
        assert one.engine.held == {}, "a sequence was left open"


class Reader:
    """Collects the pieces of a job."""

    def __init__(
        self, batcher: Batcher, prompt: list[int], sampling: Sampling, branch: int = 0, scored: bool = False
    ) -> None:
        self.pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.job: Job = batcher.submit(prompt, sampling, self.pieces.put, branch, scored)
        self.seen: list[Piece] = []

    def wait(self) -> Reader:
        while not self.seen or not self.seen[-1].last:
            self.seen.append(self.pieces.get(timeout=30))
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.wait().seen for token, _ in piece.tokens]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.wait().seen)

    @property
    def finish(self) -> str | None:
        return self.wait().seen[-1].finish

    @property
    def error(self) -> Exception | None:
        return self.wait().seen[-1].error


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(2, 96), k=length)


def test_every_text_is_what_it_is_alone(batcher: Callable[..., Batcher], words: Words) -> None:
    one = batcher(Limits(running=5, kept=2, chunk=9, alone=30), sequences=7, never=NOT_ASCII)
    asked = [(prompt(n, 1 + 7 * n % 90), Sampling(temperature=0, max_tokens=3 + n % 20)) for n in range(40)]
    for reader, (tokens, sampling) in [(Reader(one, *pair), pair) for pair in asked]:
        expected = one.engine.after(tokens, sampling.max_tokens)
        assert reader.tokens == expected
        assert reader.text == words.decode(expected)
        assert reader.finish == "length"
    assert max(map(len, one.engine.parts)) == 5


def test_one_seed_gives_one_text_whatever_runs_beside_it(batcher: Callable[..., Batcher]) -> None:
    one, asked = batcher(), Sampling(temperature=2.0, seed=11, max_tokens=30)
    alone = Reader(one, prompt(0, 20), asked).tokens
    crowd = [Reader(one, prompt(n, 30), Sampling(temperature=2.0, max_tokens=30)) for n in range(1, 7)]
    again, branch = Reader(one, prompt(0, 20), asked), Reader(one, prompt(0, 20), asked, branch=1)
    assert again.tokens == alone
    assert branch.tokens != alone
    assert len({tuple(reader.tokens) for reader in crowd}) == 6


def test_a_pass_reads_no_more_than_its_chunk(batcher: Callable[..., Batcher]) -> None:
    one = batcher(Limits(running=4, chunk=16, alone=64))
    writing = Reader(one, prompt(0, 4), Sampling(temperature=0, max_tokens=200))
    assert writing.pieces.get(timeout=30).tokens
    long, short = Reader(one, prompt(1, 200), GREEDY), Reader(one, prompt(2, 8), GREEDY)
    assert long.tokens and short.tokens and writing.tokens
    mixed = [list(map(len, part.values())) for part in one.engine.parts if max(map(len, part.values())) > 1]
    mixed = [lengths for lengths in mixed if 1 in lengths]
    assert mixed and all(sum(lengths) <= 16 + 4 for lengths in mixed)
    assert all(sum(map(len, part.values())) <= 64 for part in one.engine.parts)


def test_nobody_stalls_while_a_long_prompt_is_read(batcher: Callable[..., Batcher]) -> None:
    one = batcher(Limits(running=3, chunk=8, alone=64), context=2000)
    writing = Reader(one, prompt(0, 4), Sampling(temperature=0, max_tokens=400))
    writing.pieces.get(timeout=30)
    sequence = writing.job.sequence
    Reader(one, prompt(1, 1000), GREEDY).wait()
    reading = [part for part in one.engine.parts if max(map(len, part.values())) > 1 and len(part) > 1]
    assert len(reading) >= 1000 // 8 - 8 and all(len(part[sequence]) == 1 for part in reading)
    one.cancel(writing.job)


def test_a_shared_beginning_is_not_computed_again(batcher: Callable[..., Batcher]) -> None:
    one = batcher()
    first = Reader(one, prompt(0, 60), GREEDY)
    talk = [*first.job.prompt, *first.tokens]
    second = Reader(one, [*talk, 9, 8, 7], GREEDY)
    assert second.tokens == one.engine.after([*talk, 9, 8, 7], 12)
    assert second.job.reused == len(talk) - 1  # the last token of a text is never fed
    third = Reader(one, prompt(0, 60), GREEDY)
    assert third.tokens == first.tokens and third.job.reused == 59
    fourth = Reader(one, [*prompt(0, 30), *prompt(5, 30)], GREEDY)
    assert fourth.tokens == one.engine.after([*prompt(0, 30), *prompt(5, 30)], 12) and fourth.job.reused == 30
    assert one.stats().reused_tokens == 71 + 59 + 30


def test_equal_prompts_that_come_together_are_read_once(batcher: Callable[..., Batcher]) -> None:
    one = batcher(Limits(running=8, chunk=16, alone=16), seconds=0.01)
    readers = [Reader(one, prompt(3, 100), Sampling(seed=4, max_tokens=20), branch) for branch in range(8)]
    assert len({tuple(reader.tokens) for reader in readers}) > 1
    assert sorted(reader.job.reused for reader in readers)[1] >= 100 - 16


def test_an_engine_that_cannot_forget_computes_anew(batcher: Callable[..., Batcher]) -> None:
    one = batcher(forgets=False)
    for _ in range(3):
        assert Reader(one, prompt(0, 40), GREEDY).tokens == one.engine.after(prompt(0, 40), 12)


def test_kept_caches_give_way(batcher: Callable[..., Batcher]) -> None:
    one = batcher(Limits(running=2, kept=1), sequences=3)
    for n in range(12):
        assert Reader(one, prompt(n, 40), GREEDY).finish == "length"
    readers = [Reader(one, prompt(n, 40), GREEDY) for n in range(6)]
    assert [reader.finish for reader in readers] == ["length"] * 6
    assert one.stats().kept <= 3


def test_only_the_one_at_fault_fails(batcher: Callable[..., Batcher]) -> None:
    one = batcher(poison=200, hollow=201, never=(0, 1, 200, 201))
    clean = [prompt(n, 50) for n in range(10)]
    readers = [Reader(one, tokens, GREEDY) for tokens in clean[:5]]
    bad = [Reader(one, [*clean[9], 200], GREEDY), Reader(one, [*clean[8], 201], GREEDY)]
    readers += [Reader(one, tokens, GREEDY) for tokens in clean[5:]]
    assert isinstance(bad[0].error, RuntimeError) and isinstance(bad[1].error, InputError)
    for reader, tokens in zip(readers, clean, strict=True):
        assert reader.error is None and reader.tokens == one.engine.after(tokens, 12)


def test_cancelled_at_any_time(batcher: Callable[..., Batcher]) -> None:
    one = batcher(Limits(running=3, chunk=8, alone=8), seconds=0.001)
    chance = random.Random(0)
    for round in range(6):
        readers = [Reader(one, prompt(n, 80), Sampling(temperature=0, max_tokens=60)) for n in range(9)]
        cancelled = chance.sample(readers, 5)
        for reader in cancelled:
            time.sleep(chance.random() * 0.02 * round)
            one.cancel(reader.job)
        for n, reader in enumerate(readers):
            expected = one.engine.after(prompt(n, 80), 60)
            if reader in cancelled:
                assert reader.finish in ("cancelled", "length") and reader.tokens == expected[: len(reader.tokens)]
            else:
                assert reader.tokens == expected
    assert one.stats().running == one.stats().waiting == 0


def test_the_end_of_the_model_ends_a_text(batcher: Callable[..., Batcher], words: Words) -> None:
    one, start = batcher(never=(0,)), prompt(1, 20)
    ended, on = Sampling(temperature=0, logit_bias={1: 100}), Sampling(temperature=0, max_tokens=9, ignore_eos=True)
    reader = Reader(one, start, ended)
    assert (reader.finish, reader.text, reader.job.generated) == ("stop", "", 1)
    assert Reader(one, start, on).finish == "length"
    assert 1 in words.ends


def test_stop_strings_cross_the_borders_of_tokens(batcher: Callable[..., Batcher], words: Words) -> None:
    one = batcher(never=NOT_ASCII)
    whole = words.decode(one.engine.after(prompt(2, 10), 40))
    reader = Reader(one, prompt(2, 10), Sampling(temperature=0, max_tokens=40, stop=("nowhere", whole[17:20])))
    assert (reader.text, reader.finish) == (whole[:17], "stop")
    assert len(reader.seen) > 10  # it came in pieces


def test_logprobs_of_every_token(batcher: Callable[..., Batcher]) -> None:
    one = batcher()
    reader = Reader(one, prompt(2, 10), Sampling(temperature=0, max_tokens=20, logprobs=3))
    found = [logs for piece in reader.wait().seen for _, logs in piece.tokens]
    assert len(found) == 20
    for token, logs in zip(reader.tokens, found, strict=True):
        assert logs is not None and len(logs.top) == 3 and logs.top[0] == (token, logs.taken)


def test_a_prompt_is_scored_among_others_and_whatever_caches_hold(
    batcher: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "SCORED", 7 * 258)  # seven tokens at once
    one, start = batcher(Limits(running=3)), prompt(2, 40)
    Reader(one, start, GREEDY).wait()
    options = [(GREEDY, False), (Sampling(temperature=0, max_tokens=12, logprobs=2), True), (GREEDY, False)]
    scored = Sampling(temperature=3, seed=1, max_tokens=0, logprobs=0)
    readers = [Reader(one, start, *how, scored=on) for *how, on in options]
    last = Reader(one, start, scored, scored=True).wait()
    assert len({tuple(reader.wait().tokens) for reader in readers}) == 1
    for reader, top in ((readers[1], 2), (last, 0)):
        assert reader.job.reused == 0
        expected = [logprobs(one.engine.logits(start[:place]), start[place], top) for place in range(1, 40)]
        assert reader.job.scores == expected
    assert readers[0].job.scores == [] and (last.finish, last.tokens) == ("length", [])


def test_no_token_is_drawn_where_none_may_be(batcher: Callable[..., Batcher]) -> None:
    one = batcher()
    for start in ([5], prompt(2, 600)[:500]):
        reader = Reader(one, start, Sampling(max_tokens=0))
        assert (reader.finish, reader.text, reader.job.generated) == ("length", "", 0)


def test_what_cannot_be_is_refused_at_once(batcher: Callable[..., Batcher]) -> None:
    one = batcher(context=64)
    for tokens, sampling, error, word in [
        ([], GREEDY, InputError, "no token"),
        (prompt(0, 64), GREEDY, InputError, "context has 64"),
        ([258], GREEDY, InputError, "vocabulary"),
        (prompt(0, 60), GREEDY, SpecError, "at most 4"),
        ([2], Sampling(logit_bias={258: 1.0}), SpecError, "vocabulary"),
    ]:
        with pytest.raises(error, match=word):
            one.submit(tokens, sampling, lambda piece: None)
    assert len(Reader(one, prompt(0, 60), Sampling(temperature=0)).tokens) == 4


def test_a_full_queue_says_so(batcher: Callable[..., Batcher]) -> None:
    one = batcher(Limits(running=1, waiting=3), seconds=0.01)
    readers = [Reader(one, [5], GREEDY)]
    with pytest.raises(Busy, match="waiting"):
        readers += [Reader(one, [5], GREEDY) for _ in range(10)]
    assert readers[0].finish == "length"
    deadline = time.monotonic() + 30
    while one.stats().running + one.stats().waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Reader(one, [5], GREEDY).finish == "length"


def test_closing_ends_every_text_with_an_error(words: Words) -> None:
    one = Batcher(FakeEngine(seconds=0.005), words, Limits(running=2))
    readers = [Reader(one, [5 + n], Sampling(temperature=0)) for n in range(5)]
    readers[0].pieces.get(timeout=30)
    one.close()
    assert all(isinstance(reader.error, Stopped) for reader in readers)
    assert one.engine.held == {}
    with pytest.raises(Stopped, match="stopping"):
        Reader(one, [5], GREEDY)


def test_a_reader_that_raises_is_dropped(batcher: Callable[..., Batcher]) -> None:
    one = batcher()

    def gone(piece: Piece) -> None:
        raise RuntimeError("the loop is closed")

    one.submit(prompt(0, 20), Sampling(temperature=0), gone)
    assert Reader(one, prompt(1, 20), GREEDY).tokens == one.engine.after(prompt(1, 20), 12)


def test_stream_is_cancelled_when_it_is_left(batcher: Callable[..., Batcher]) -> None:
    one = batcher(seconds=0.001)
    pieces = one.stream(prompt(0, 20), Sampling(temperature=0))
    assert next(pieces).tokens
    pieces.close()
    deadline = time.monotonic() + 30
    while one.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert one.stats().running == 0 and one.stats().generated_tokens < 400  # of 492
    with pytest.raises(InputError, match="no token"):
        next(one.stream([], GREEDY))


@pytest.mark.slow
def test_fifty_threads_mix_nothing_up(batcher: Callable[..., Batcher]) -> None:
    one = batcher(Limits(running=8, waiting=64, kept=4, chunk=16, alone=64))
    wrong: list[str] = []
    begin = prompt(0, 40)

    def client(number: int) -> None:
        chance = random.Random(number)
        for _ in range(6):
            tokens = [*begin[: chance.randrange(41)], *chance.choices(range(2, 258), k=chance.randrange(1, 30))]
            reader = Reader(one, tokens, Sampling(temperature=0, max_tokens=chance.randrange(1, 25)))
            if chance.random() < 0.3:
                one.cancel(reader.job)
            expected = one.engine.after(tokens, reader.job.most)
            if reader.tokens != expected[: len(reader.tokens)] or (
                reader.finish != "cancelled" and len(reader.tokens) != len(expected)
            ):
                wrong.append(f"client {number}: {reader.finish}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert (one.stats().running, one.stats().waiting) == (0, 0) and one.stats().kept <= 12


def test_shared_beginnings() -> None:
    chance = random.Random(0)
    for _ in range(200):
        a = chance.choices((1, 2), k=chance.randrange(9))
        b = chance.choices((1, 2), k=chance.randrange(9))
        expected = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert shared(a, tuple(b)) == expected


def test_the_least_recently_used_cache_goes_first() -> None:
    engine = FakeEngine(sequences=3)
    prefixes = Prefixes(engine, 3)
    for n in range(3):
        sequence, reused = prefixes.begin(prompt(n, 30), [])
        engine.feed([(sequence, prompt(n, 30))])
        prefixes.keep(sequence, prompt(n, 30))
        assert reused == 0
    assert prefixes.begin([*prompt(0, 20), 3], [])[1] == 20  # a copy; the cache of prompt 1 goes
    assert [prefixes.longest(prompt(n, 30), []) for n in range(3)] == [29, 0, 29]
    assert prefixes.begin(prompt(3, 30), [(1, [])])[1] == 0  # beside the copy there is room for one more
    assert [prefixes.longest(prompt(n, 30), []) for n in range(3)] == [29, 0, 0]


def test_the_only_sequence_is_cut_to_what_is_shared(batcher: Callable[..., Batcher]) -> None:
    one = batcher(Limits(running=1, kept=0), sequences=1)
    for tokens, reused in ((prompt(0, 60), 0), ([*prompt(0, 30), *prompt(1, 9)], 30), (prompt(2, 50), 0)):
        reader = Reader(one, tokens, GREEDY)
        assert reader.tokens == one.engine.after(tokens, 12)
        assert reader.job.reused == reused
