"""What HTTP, Serve and several processes cost, and what is left of the service when all want it.

    flashvl bench serve --preset static --random-weights

The same engine answers the same requests in this process and behind the service, in turn; both
begin with a JPEG of 1024x768, of a new picture each time. Then the service alone gets several times
the requests that it can answer.
"""

import asyncio
import base64
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil

from flashvl.bench.contenders import make_photo
from flashvl.bench.models import RandomWeights, build_random
from flashvl.config import DEFAULT_PROMPT
from flashvl.data.features import ask_about_image, decode_tiles
from flashvl.engine import AsyncEngine, Engine, Request
from flashvl.model.loading import model_id
from flashvl.serve.config import ServiceConfig

WAYS = ("engine", "service")
REPORT_S = 0.5

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Of one way at one width; medians of rounds, in them over requests."""

    name: str
    width: int
    """Clients, each of which asks again when it has its answer."""
    ttft_ms: float
    """From the JPEG in the client's hand to the first token there."""
    tokens_per_s: float
    """Of all clients."""
    largest_gap_ms: float
    """Between two pieces of one answer; the median of the answers' largest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overload:
    """The service under more requests than it can answer."""

    capacity_per_s: float
    """Answers to as many clients as it has slots."""
    offered_per_s: float
    answered_per_s: float
    """Of an answer that went on after the load, the part before its end counts."""
    refused: int
    """With status 429."""
    failed: int
    """In any other way; of none is anything to be heard."""
    ttft_p50_ms: float
    ttft_p99_ms: float
    """Of those that were answered."""
    ttft_bound_ms: float
    """What the queue's length and the capacity imply: (waiting + 1 batch of slots) / capacity."""
    memory_start_mb: float
    memory_end_mb: float
    """Of the service's processes: a tenth into the load, and at its end."""


@dataclass(slots=True)
class _Answer:
    asked_s: float
    pieces_s: list[float]
    status: int = 200

    @property
    def ttft_s(self) -> float:
        return self.pieces_s[0] - self.asked_s

    @property
    def largest_gap_s(self) -> float:
        return max((b - a for a, b in itertools.pairwise(self.pieces_s)), default=0.0)

    def share_before(self, end_s: float) -> float:
        return sum(piece_s <= end_s for piece_s in self.pieces_s) / len(self.pieces_s)


Ask = Callable[[bytes], Awaitable[_Answer]]


@contextmanager
def served_model(model: str, preset: str | None) -> Iterator[str]:
    """A folder with the model; of a preset, one with random weights as long as it is needed."""
    if preset is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        built, processor = build_random(preset, RandomWeights.for_this_machine())
        built.save_pretrained(folder)
        processor.save_pretrained(folder)
        del built
        yield folder


def compare_with_engine(
    config: ServiceConfig,
    url: str,
    *,
    widths: tuple[int, ...],
    tokens: int,
    requests: int,
    rounds: int,
    on_progress: OnProgress,
) -> list[Speed]:
    """The engine here and the one behind `url`, in turn.

    Args:
        requests: of each client, each about a picture of its own.
    """
    engine = Engine.from_pretrained(config.model, config.dtype, max_num_seqs=config.max_num_seqs)
    runs: dict[tuple[str, int], list[Speed]] = {}
    photos = _photos()
    plan = list(itertools.product(range(rounds), widths, WAYS))

    async def run(async_engine: AsyncEngine) -> None:
        async with aiohttp.ClientSession() as session:
            asks: dict[str, Ask] = {
                "engine": lambda jpeg: _ask_engine(async_engine, jpeg, tokens),
                "service": lambda jpeg: _ask_service(session, url, config, jpeg, tokens),
            }
            for ask in asks.values():
                await _closed_loop(ask, photos, 1, 2)
            for number, (_, width, way) in enumerate(plan):
                answers, seconds = await _closed_loop(asks[way], photos, width, requests)
                speed = Speed(
                    name=way,
                    width=width,
                    ttft_ms=1e3 * statistics.median(each.ttft_s for each in answers),
                    tokens_per_s=tokens * len(answers) / seconds,
                    largest_gap_ms=1e3 * statistics.median(each.largest_gap_s for each in answers),
                )
                runs.setdefault((way, width), []).append(speed)
                on_progress(number + 1, len(plan))

    with AsyncEngine(engine) as async_engine:
        asyncio.run(run(async_engine))
    return [_median(runs[way, width]) for width in widths for way in WAYS]


async def measure_overload(
    config: ServiceConfig,
    url: str,
    *,
    times: float,
    tokens: int,
    requests: int,
    seconds: float,
    on_progress: OnProgress,
) -> Overload:
    """Requests that come at random, `times` as many as can be answered, for `seconds`.

    Args:
        requests: of each client, where as many as there are slots measure the capacity.
    """
    # Few pictures, drawn before: the client shares the machine's cores with the service. The engine
    # has seen them all when its capacity is measured, as it has under the load.
    photos = itertools.cycle(list(itertools.islice(_photos(), 2 * config.max_num_seqs)))
    rng = random.Random(0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        def ask(jpeg: bytes) -> Awaitable[_Answer]:
            return _ask_service(session, url, config, jpeg, tokens)

        slots = config.max_num_seqs
        await _closed_loop(ask, photos, slots, 2)
        answers, took_s = await _closed_loop(ask, photos, slots, requests)
        capacity = len(answers) / took_s
        tasks: list[asyncio.Task[_Answer]] = []
        memory: list[float] = []
        began_s = time.perf_counter()
        next_s = report_s = began_s
        while (now_s := time.perf_counter()) < began_s + seconds:
            if now_s >= report_s:
                memory.append(_service_mb())
                on_progress(round(now_s - began_s), round(seconds))
                report_s += max(REPORT_S, seconds / 100)
            if now_s >= next_s:
                tasks.append(asyncio.create_task(_forgiving(ask(next(photos)))))
                next_s += rng.expovariate(times * capacity)
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        ended_s = time.perf_counter()
        all_answers = await asyncio.gather(*tasks)
        memory.append(_service_mb())
    good = [each for each in all_answers if each.status == 200]
    within = sum(each.share_before(ended_s) for each in good)
    ttfts = sorted(1e3 * each.ttft_s for each in good)
    return Overload(
        capacity_per_s=capacity,
        offered_per_s=len(tasks) / seconds,
        answered_per_s=within / (ended_s - began_s),
        refused=sum(each.status == 429 for each in all_answers),
        failed=sum(each.status not in (200, 429) for each in all_answers),
        ttft_p50_ms=ttfts[len(ttfts) // 2],
        ttft_p99_ms=ttfts[int(len(ttfts) * 0.99)],
        ttft_bound_ms=1e3 * (config.max_waiting + slots) / capacity,
        memory_start_mb=memory[len(memory) // 10],
        memory_end_mb=memory[-1],
    )


def _photos() -> Iterator[bytes]:
    """JPEGs, none of which an engine has seen."""
    first = random.randrange(2**30)
    return (make_photo(first + number) for number in itertools.count())


async def _closed_loop(
    ask: Ask, photos: Iterator[bytes], width: int, requests: int
) -> tuple[list[_Answer], float]:
    """`width` clients with `requests` each; the answers, and the time that all of them took."""
    jpegs = [[next(photos) for _ in range(requests)] for _ in range(width)]
    began_s = time.perf_counter()

    async def client(own: list[bytes]) -> list[_Answer]:
        return [await ask(jpeg) for jpeg in own]

    answers = await asyncio.gather(*map(client, jpegs))
    return list(itertools.chain.from_iterable(answers)), time.perf_counter() - began_s


async def _ask_engine(engine: AsyncEngine, jpeg: bytes, tokens: int) -> _Answer:
    answer = _Answer(time.perf_counter(), [])
    tiles = await asyncio.to_thread(decode_tiles, [jpeg], engine.processor)
    request = Request(
        messages=ask_about_image(DEFAULT_PROMPT),
        images=tiles,
        max_new_tokens=tokens,
        ignore_eos=True,
    )
    async for _ in engine.stream(request):
        answer.pieces_s.append(time.perf_counter())
    return answer


async def _ask_service(
    session: aiohttp.ClientSession, url: str, config: ServiceConfig, jpeg: bytes, tokens: int
) -> _Answer:
    answer = _Answer(time.perf_counter(), [])
    image = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    body: dict[str, Any] = {
        "model": model_id(config.model),
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image}},
                    {"type": "text", "text": DEFAULT_PROMPT},
                ],
            }
        ],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        answer.status = response.status
        if response.status != 200:
            await response.read()
            return answer
        async for chunk in _chunks(response):
            if "error" in chunk:
                answer.status = 500
                break
            (choice,) = chunk["choices"]
            # The role comes with the first token, whose text may be a part of a character.
            if choice["delta"] or choice["finish_reason"]:
                answer.pieces_s.append(time.perf_counter())
    return answer


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


async def _forgiving(asked: Awaitable[_Answer]) -> _Answer:
    try:
        return await asked
    except (aiohttp.ClientError, OSError):
        return _Answer(0.0, [], status=0)


def _median(runs: list[Speed]) -> Speed:
    return Speed(
        name=runs[0].name,
        width=runs[0].width,
        ttft_ms=statistics.median(run.ttft_ms for run in runs),
        tokens_per_s=statistics.median(run.tokens_per_s for run in runs),
        largest_gap_ms=statistics.median(run.largest_gap_ms for run in runs),
    )


def _service_mb() -> float:
    """Resident memory of Serve's processes of this machine's own Ray."""
    names = ("ray::ProxyActor", "ray::SERVE_REPLICA", "ray::ServeReplica")
    children = psutil.Process().children(recursive=True)
    total = 0
    for child in children:
        try:
            if child.name().startswith(names):
                total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20
