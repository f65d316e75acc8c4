"""Requests of a lower `priority` number go first, whatever the others do, and change no answer."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvl.engine import Completion, Engine, Request
from tests.engine.test_groups import ask, make_engine, one_by_one

OFFLINE = 1
"""A `priority` behind that of requests that set none."""


@pytest.fixture(scope="module")
def folder(random_folder: Callable[[str], Path]) -> Path:
    return random_folder("tiny-iss")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder, max_num_seqs=8)


def offline(engine: Engine, picture: int, num_words: int = 1, **options: object) -> Request:
    """A request with a long answer; with 150 words, its prompt is read in several pieces."""
    text = " ".join(["circle"] * num_words)
    given = {"max_new_tokens": 30, "ignore_eos": True} | options
    return replace(ask(engine, picture, text, **given), priority=OFFLINE)


def finish(engine: Engine, numbers: list[int]) -> list[Completion]:
    found: dict[int, Completion] = {}
    while len(found) < len(numbers):
        engine.step()
        for number in numbers:
            for delta in engine.take(number):
                assert delta.completion is not None
                found[number] = delta.completion
    assert engine.is_idle
    return [found[number] for number in numbers]


@settings(deadline=None, max_examples=25)
@given(
    words=st.lists(st.sampled_from([1, 60, 150]), min_size=1, max_size=6),
    num_steps=st.integers(0, 12),
    picture=st.integers(-1, 2),
)
def test_a_request_waits_for_nothing_but_the_step_in_progress(
    engine: Engine, words: list[int], num_steps: int, picture: int
) -> None:
    """Its prompt is read in the first step after it came, in whatever state the others are."""
    rows = [offline(engine, place % 4 - 1, count, seed=place) for place, count in enumerate(words)]
    online = ask(engine, picture, max_new_tokens=5, ignore_eos=True)
    numbers = [engine.add(row) for row in rows]
    for _ in range(num_steps):
        engine.step()
    first = engine.add(online, is_streamed=True)
    engine.step()
    assert engine.take(first)
    engine.cancel(first)
    for number in numbers:
        engine.cancel(number)


def test_the_others_pause_until_the_prompt_is_read_and_then_go_on(folder: Path) -> None:
    """A prompt of three pieces is read in three steps; afterwards all decode, in the same steps."""
    engine = make_engine(folder, max_num_seqs=8, max_prefill_tokens=64)
    row = engine.add(offline(engine, -1), is_streamed=True)
    while not engine.take(row):
        engine.step()
    request = ask(engine, -1, " ".join(["circle"] * 100), max_new_tokens=5, ignore_eos=True)
    length = one_by_one(engine, [request])[0].prompt_tokens
    engine.take(row)
    assert 128 < length <= 192
    online = engine.add(request, is_streamed=True)
    for is_first in (False, False, True):
        engine.step()
        assert not engine.take(row)
        assert bool(engine.take(online)) == is_first
    for _ in range(4):
        engine.step()
        assert len(engine.take(row)) == len(engine.take(online)) == 1
    engine.cancel(row)


def test_answers_of_the_same_class_do_not_pause(engine: Engine) -> None:
    first = engine.add(ask(engine, 0, max_new_tokens=9, ignore_eos=True), is_streamed=True)
    engine.step()
    engine.take(first)
    others = [engine.add(ask(engine, -1, "a " * count)) for count in (5, 30, 60)]
    came = []
    for _ in range(6):
        engine.step()
        came.append(bool(engine.take(first)))
    assert came == [True, False] * 3
    for number in [first, *others]:
        engine.cancel(number)


def test_steps_of_the_others_are_small(engine: Engine) -> None:
    for words in ([1] * 6, [150, 60, 1], [60] * 5):
        numbers = [
            engine.add(offline(engine, picture % 3, count, max_new_tokens=1))
            for picture, count in enumerate(words)
        ]
        while not engine.is_idle:
            read, misses = engine.num_prefilled_tokens, engine.image_features.num_misses
            engine.step()
            read = engine.num_prefilled_tokens - read
            misses = engine.image_features.num_misses - misses
            assert read <= engine.scheduler.small_prefill_tokens
            assert not (read and misses)
        for number in numbers:
            engine.take(number)


def test_images_of_the_others_are_not_kept(engine: Engine) -> None:
    engine.image_features.clear()
    engine.generate([offline(engine, 0)])
    assert not engine.image_features.kept
    engine.generate([ask(engine, 0)])
    hits = engine.image_features.num_hits
    engine.generate([offline(engine, 0)])
    assert (len(engine.image_features.kept), engine.image_features.num_hits) == (1, hits + 1)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_answers_are_the_same_in_any_company(folder: Path, engine: Engine, seed: int) -> None:
    """Requests of three classes come at any time, with equal prompts and long ones among them."""
    rng = random.Random(seed)
    requests = [
        replace(
            ask(engine, rng.choice([-1, 0, 1]), " ".join(["circle"] * rng.choice([1, 1, 60, 150]))),
            priority=rng.choice([0, 1, 2]),
            max_new_tokens=rng.choice([1, 5, 20]),
            temperature=rng.choice([0.0, 1.5]),
            seed=rng.randrange(3),
        )
        for _ in range(12)
    ]
    expected = one_by_one(engine, [replace(request, priority=0) for request in requests])
    numbers = []
    for request in requests:
        numbers.append(engine.add(request))
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            engine.step()
    found = finish(engine, numbers)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
    assert engine.runner.cache.num_prompt_tokens == 0
    assert not engine.scheduler._sharing


def test_the_others_end_although_requests_never_cease(engine: Engine) -> None:
    """One online request follows another: each leaves steps between its first token and its end."""
    row = engine.add(offline(engine, 0, 150))
    online = None
    for _ in range(2000):
        if online is None:
            online = engine.add(ask(engine, 1, max_new_tokens=3, ignore_eos=True))
        engine.step()
        if engine.take(online):
            online = None
        if engine.take(row):
            break
    else:
        raise AssertionError("the row of a job was never answered")
    if online is not None:
        engine.cancel(online)
