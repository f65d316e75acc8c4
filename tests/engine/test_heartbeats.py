"""A stream tells that it is alive, and is otherwise what it was."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from flashvl.engine import heartbeats
from flashvl.engine.heartbeats import Heartbeat, with_heartbeats

BEAT_S = 0.02


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "HEARTBEAT_S", BEAT_S)


class Source:
    """Numbers that come after given pauses; an error in place of a pause is raised."""

    def __init__(self, *pauses_s: float | Exception):
        self.pauses_s, self.is_closed, self.end = pauses_s, False, ""

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number, pause_s in enumerate(self.pauses_s):
                if isinstance(pause_s, Exception):
                    raise pause_s
                await asyncio.sleep(pause_s)
                yield number
        except BaseException as error:
            self.end = type(error).__name__
            raise
        finally:
            self.is_closed = True


async def read(source: Source, most: int = 10_000) -> list[int | None]:
    """At most so many items; None for a heartbeat."""
    found: list[int | None] = []
    async with contextlib.aclosing(with_heartbeats(source.items())) as items:
        async for item in items:
            found.append(None if isinstance(item, Heartbeat) else item)
            if len(found) == most:
                break
    return found


def test_a_fast_stream_has_no_heartbeats() -> None:
    source = Source(*[0] * 50)
    assert asyncio.run(read(source)) == list(range(50))
    assert source.is_closed


def test_heartbeats_fill_the_pauses_and_nothing_is_lost() -> None:
    found = asyncio.run(read(Source(0, 10 * BEAT_S, 0, 5 * BEAT_S)))
    assert [item for item in found if item is not None] == [0, 1, 2, 3]
    before = found.index(1) - found.index(0) - 1
    assert 2 <= before <= 10
    assert None in found[found.index(2) : found.index(3)]
    assert found.index(2) == found.index(1) + 1


def test_an_error_comes_after_what_was_before_it() -> None:
    source = Source(0, 3 * BEAT_S, ValueError("bad"))
    with pytest.raises(ValueError, match="bad"):
        asyncio.run(read(source))
    assert source.is_closed


@pytest.mark.parametrize("most", [1, 3])  # after an item, and after a heartbeat
def test_a_reader_that_leaves_closes_the_stream(most: int) -> None:
    source = Source(0, 3600)
    assert len(asyncio.run(read(source, most))) == most
    assert source.is_closed
    assert source.end == ("GeneratorExit" if most == 1 else "CancelledError")


def test_a_reader_that_is_cancelled_closes_the_stream() -> None:
    source = Source(0, 3600)

    async def cancel() -> None:
        reader = asyncio.create_task(read(source))
        await asyncio.sleep(5 * BEAT_S)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    asyncio.run(cancel())
    assert source.end == "CancelledError"
