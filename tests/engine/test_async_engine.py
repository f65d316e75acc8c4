"""Many coroutines share an engine: each gets its own answer, or its own error."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashvl.data import synthetic
from flashvl.engine import AsyncEngine, Completion, Engine, Request
from flashvl.errors import DataError
from flashvl.model.loading import load_model, load_processor
from tests.support.images import noise


@pytest.fixture(scope="module")
def engine(tiny_random: Path) -> Engine:
    return Engine(load_model(tiny_random), load_processor(tiny_random), max_num_seqs=4)


@pytest.fixture
def asynchronous(tiny_random: Path) -> Iterator[AsyncEngine]:
    engine = Engine(load_model(tiny_random), load_processor(tiny_random), max_num_seqs=4)
    with AsyncEngine(engine) as wrapped:
        yield wrapped


def ask(seed: int, **options: object) -> Request:
    given = {"images": [noise(seed, (96, 96))], "max_new_tokens": 9} | options
    messages = [{"role": "user", "content": "<image>\nDescribe the image."}]
    return Request(messages=messages, **given)  # type: ignore[arg-type]


def test_each_gets_its_own_answer(asynchronous: AsyncEngine, engine: Engine) -> None:
    async def all_at_once() -> list[object]:
        return await asyncio.gather(*(asynchronous.generate(ask(seed)) for seed in range(20)))

    expected = [engine.generate([ask(seed)])[0] for seed in range(20)]
    assert asyncio.run(all_at_once()) == expected
    assert asyncio.run(all_at_once()) == expected  # in another event loop


@pytest.mark.parametrize("is_streamed", [False, True])
def test_answers_to_one_prompt_share_it(
    asynchronous: AsyncEngine, engine: Engine, is_streamed: bool
) -> None:
    """More than there are slots: those that wait join those that run."""
    requests = [
        dataclasses.replace(ask(40), seed=seed, temperature=1.5, ignore_eos=True)
        for seed in range(8)
    ]
    expected = [engine.generate([request])[0] for request in requests]

    async def collect() -> tuple[dict[int, Completion], list[str]]:
        found, texts = {}, [""] * len(requests)
        async for number, delta in asynchronous.answer(requests, is_streamed):
            texts[number] += delta.text
            if delta.completion is not None:
                found[number] = delta.completion
        return found, texts

    found, texts = asyncio.run(collect())
    assert [found[number] for number in range(8)] == expected
    assert texts == [completion.text for completion in expected]
    stats = asynchronous.stats()
    assert (stats.num_image_misses, stats.num_image_hits) == (1, 0)
    assert stats.num_prefilled_tokens == expected[0].prompt_tokens


def test_one_bad_request_ends_all_that_were_asked_together(asynchronous: AsyncEngine) -> None:
    requests = [ask(1, max_new_tokens=900, ignore_eos=True), ask(2, max_new_tokens=10**6)]

    async def collect() -> None:
        async for _ in asynchronous.answer(requests, False):
            pass

    with pytest.raises(DataError, match="max_new_tokens"):
        asyncio.run(collect())
    asyncio.run(asynchronous.generate(ask(3)))  # after them
    assert asynchronous.stats().is_idle


def test_a_stream_comes_in_pieces() -> None:
    """An engine of the shipped model; random weights would answer with halves of characters."""
    drawn = synthetic.sample("heldout", 0, 1, tasks=("caption",))
    messages = [{"role": "user", "content": "<image>\nDescribe the image."}]
    request = Request(messages=messages, images=[drawn.image()])

    async def pieces(asynchronous: AsyncEngine) -> list[str]:
        return [delta.text async for delta in asynchronous.stream(request)]

    engine = Engine.from_pretrained("tiny")
    expected = engine.generate([request])[0].text
    with AsyncEngine(engine) as asynchronous:
        found = asyncio.run(pieces(asynchronous))
    assert len(found) > 2
    assert "".join(found) == expected


def test_a_bad_request_fails_alone(asynchronous: AsyncEngine) -> None:
    async def both() -> list[object]:
        return await asyncio.gather(
            asynchronous.generate(ask(1)),
            asynchronous.generate(ask(2, images=())),
            return_exceptions=True,
        )

    good, bad = asyncio.run(both())
    assert not isinstance(good, BaseException)
    assert isinstance(bad, DataError)


def test_who_goes_away_frees_the_place(asynchronous: AsyncEngine) -> None:
    async def go_away() -> None:
        endless = [
            asyncio.create_task(
                asynchronous.generate(ask(seed, max_new_tokens=900, ignore_eos=True))
            )
            for seed in range(6)
        ]
        await asyncio.sleep(0.05)
        for task in endless:
            task.cancel()
        done = await asyncio.gather(*endless, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in done)
        await asynchronous.generate(ask(9))  # after them
        assert asynchronous.stats().is_idle

    asyncio.run(go_away())


def test_a_broken_engine_tells_all_who_wait_and_who_come_later(tiny_random: Path) -> None:
    engine = Engine(load_model(tiny_random), load_processor(tiny_random))

    def broken(*_: object) -> None:
        raise MemoryError("no more of it")

    engine.runner.decode = broken  # type: ignore[method-assign, assignment]
    with AsyncEngine(engine) as asynchronous:
        for _ in range(2):
            with pytest.raises(MemoryError, match="no more of it"):
                asyncio.run(asynchronous.generate(ask(1, ignore_eos=True)))


def test_a_closed_engine_answers_nobody(tiny_random: Path) -> None:
    asynchronous = AsyncEngine(Engine(load_model(tiny_random), load_processor(tiny_random)))
    asynchronous.close()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(asynchronous.generate(ask(1)))


def test_a_caller_whose_event_loop_has_closed_harms_nobody(
    asynchronous: AsyncEngine, engine: Engine
) -> None:
    """`asyncio.run` ends at the time-out, during a step of the engine."""

    async def give_up() -> None:
        request = ask(0, max_new_tokens=400, ignore_eos=True)
        await asyncio.wait_for(asynchronous.generate(request), 0.05)

    for _ in range(8):
        with pytest.raises(TimeoutError):
            asyncio.run(give_up())
    expected = engine.generate([ask(1)])[0]
    assert asyncio.run(asynchronous.generate(ask(1))) == expected
