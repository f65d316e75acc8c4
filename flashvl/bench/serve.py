"""The cost of HTTP, Serve and several processes, and the service under more load than it can bear.

    flashvl bench serve --preset static --random-weights

An engine in this process and the same engine in the service answer the same requests in turn. Every
request begins with a JPEG of 1024x768, each of a new picture. Then the service alone gets several
times the requests that it can answer.
"""

import asyncio
import base64
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil

from flashvl.bench.contenders import make_photo
from flashvl.bench.models import RandomWeights, build_random, check_preset
from flashvl.config import DEFAULT_PROMPT
from flashvl.data.features import ask_about_image, decode_tiles
from flashvl.engine import AsyncEngine, Engine, Request
from flashvl.model.loading import model_id
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.serve.config import ServiceConfig
from flashvl.serve.run import deployed

HOST = "127.0.0.1"
WIDTHS = (1, 16)
"""Numbers of clients with which the service is compared with its engine."""
WAYS = ("engine", "service")
"""Names of what answers: the engine in this process, or the one in the service."""
REPORT_S = 0.5
"""Seconds between two reports of progress and memory under overload, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """The speed of one way with one number of clients: medians over rounds of the medians over
    requests."""

    name: str
    """One of `WAYS`."""
    width: int
    """Clients, each of which asks again when it has its answer."""
    ttft_ms: float
    """Time from a client's having a JPEG to its having the first token."""
    tokens_per_s: float
    """Tokens of all clients together."""
    largest_gap_ms: float
    """The longest time between two pieces of one answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overload:
    """The service under more requests than it can answer."""

    capacity_per_s: float
    """Requests that it answers a second for as many clients as it has slots."""
    offered_per_s: float
    """Requests that came a second."""
    answered_per_s: float
    """Requests that it answered a second under the load. An answer that lasted beyond the end of
    the load counts with its share before that end."""
    refused: int
    """Requests that got HTTP 429."""
    failed: int
    """Requests that ended in any other way than by an answer or by HTTP 429."""
    ttft_p50_ms: float
    """Median time to the first token of the requests that were answered."""
    ttft_p99_ms: float
    """Time to the first token that 99% of the answered requests did not exceed."""
    ttft_bound_ms: float
    """The time that the queue and the capacity imply: (waiting + one batch of slots) / capacity."""
    memory_start_mb: float
    """Memory of the service's processes after a tenth of the load."""
    memory_end_mb: float
    """Memory of the service's processes at the end of the load."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpeeds:
    """The service beside its own engine, and under overload."""

    speeds: list[Speed]
    """For each number of clients, the engine's speed and then the service's."""
    overload: Overload | None
    """None, where it was not measured."""


@dataclass(slots=True)
class TimedAnswer:
    """When a request was made and when each piece of its answer came, by `perf_counter`."""

    asked_s: float
    pieces_s: list[float]
    status: int = 200
    """The HTTP status; 0, where there was no response."""

    @property
    def ttft_s(self) -> float:
        return self.pieces_s[0] - self.asked_s

    @property
    def largest_gap_s(self) -> float:
        return max((b - a for a, b in itertools.pairwise(self.pieces_s)), default=0.0)

    def share_before(self, end_s: float) -> float:
        """The share of the pieces that came before `end_s`."""
        return sum(piece_s <= end_s for piece_s in self.pieces_s) / len(self.pieces_s)


Way = Callable[[bytes], Awaitable[TimedAnswer]]
"""Has a JPEG answered, by the engine or by the service."""


@contextmanager
def served_model(model: str, preset: str | None, random_weights: bool) -> Iterator[str]:
    """The model's name, or a temporary folder with random weights of the preset.

    Raises:
        ConfigError: the preset is unknown, or only one of `preset` and `random_weights` is given.
    """
    check_preset(preset, random_weights)
    if preset is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        built, processor = build_random(preset, RandomWeights.for_this_machine())
        built.save_pretrained(folder)
        processor.save_pretrained(folder)
        del built
        yield folder


def measure_service(
    model: str,
    port: int,
    *,
    slots: int,
    tokens: int,
    requests: int,
    rounds: int,
    times: float,
    seconds: float,
    on_progress: ShowProgress = ignore_progress,
) -> ServiceSpeeds:
    """Deploy a service of `model` at `port`, and measure it; Ray must be started already.

    Args:
        slots: requests that its engine answers at once; half as many may wait.
        tokens: tokens of each answer.
        requests: requests of each client, each about a picture of its own.
        times: load as a multiple of the capacity.
        seconds: duration of the overload; 0 leaves it out.
    """
    config = ServiceConfig(model=model, max_num_seqs=slots, max_waiting=slots // 2)
    overload = None
    with deployed(config, HOST, port) as url:
        speeds = compare_with_engine(
            config,
            url,
            widths=WIDTHS,
            tokens=tokens,
            requests=requests,
            rounds=rounds,
            on_progress=on_progress,
        )
        if seconds:
            measured = measure_overload(
                config,
                url,
                times=times,
                tokens=tokens,
                requests=requests,
                seconds=seconds,
                on_progress=on_progress,
            )
            overload = asyncio.run(measured)
    return ServiceSpeeds(speeds=speeds, overload=overload)


def compare_with_engine(
    config: ServiceConfig,
    url: str,
    *,
    widths: Sequence[int],
    tokens: int,
    requests: int,
    rounds: int,
    on_progress: ShowProgress = ignore_progress,
) -> list[Speed]:
    """Measure an engine in this process and the service at `url` in turn.

    Args:
        requests: requests of each client, each about a picture of its own.
    """
    engine = Engine.from_pretrained(config.model, config.dtype, max_num_seqs=config.max_num_seqs)
    runs: dict[tuple[str, int], list[Speed]] = {}
    photos = draw_photos()
    plan = list(itertools.product(range(rounds), widths, WAYS))

    async def run(async_engine: AsyncEngine) -> None:
        async with aiohttp.ClientSession() as session:
            ways: dict[str, Way] = {
                "engine": lambda jpeg: _ask_engine(async_engine, jpeg, tokens),
                "service": lambda jpeg: ask_service(session, url, config, jpeg, tokens),
            }
            for way in ways.values():
                await _closed_loop(way, photos, 1, 2)
            for number, (_, width, name) in enumerate(plan):
                answers, seconds = await _closed_loop(ways[name], photos, width, requests)
                speed = Speed(
                    name=name,
                    width=width,
                    ttft_ms=1e3 * statistics.median(each.ttft_s for each in answers),
                    tokens_per_s=tokens * len(answers) / seconds,
                    largest_gap_ms=1e3 * statistics.median(each.largest_gap_s for each in answers),
                )
                runs.setdefault((name, width), []).append(speed)
                on_progress(number + 1, len(plan), f"{name}, {width} clients")

    with AsyncEngine(engine) as async_engine:
        asyncio.run(run(async_engine))
    return [_median(runs[name, width]) for width in widths for name in WAYS]


async def measure_overload(
    config: ServiceConfig,
    url: str,
    *,
    times: float,
    tokens: int,
    requests: int,
    seconds: float,
    on_progress: ShowProgress = ignore_progress,
) -> Overload:
    """Send requests at random times, `times` as many as can be answered, for `seconds`.

    Args:
        requests: requests of each client while as many clients as slots measure the capacity.
    """
    # Few pictures, drawn before the load, as drawing them would take the service's cores. The
    # engine has seen all of them before its capacity is measured, and again before the load.
    photos = itertools.cycle(list(itertools.islice(draw_photos(), 2 * config.max_num_seqs)))
    rng = random.Random(0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        def way(jpeg: bytes) -> Awaitable[TimedAnswer]:
            return ask_service(session, url, config, jpeg, tokens)

        slots = config.max_num_seqs
        await _closed_loop(way, photos, slots, 2)
        answers, took_s = await _closed_loop(way, photos, slots, requests)
        capacity = len(answers) / took_s
        tasks: list[asyncio.Task[TimedAnswer]] = []
        memory: list[float] = []
        began_s = time.perf_counter()
        next_s = report_s = began_s
        while (now_s := time.perf_counter()) < began_s + seconds:
            if now_s >= report_s:
                memory.append(_service_mb())
                on_progress(round(now_s - began_s), round(seconds), "overload")
                report_s += max(REPORT_S, seconds / 100)
            if now_s >= next_s:
                tasks.append(asyncio.create_task(forgive(way(next(photos)))))
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


def draw_photos() -> Iterator[bytes]:
    """JPEGs that no engine has seen."""
    first = random.randrange(2**30)
    return (make_photo(first + number) for number in itertools.count())


async def _closed_loop(
    way: Way, photos: Iterator[bytes], width: int, requests: int
) -> tuple[list[TimedAnswer], float]:
    """Let `width` clients make `requests` each; returns the answers and the seconds they took."""
    jpegs = [[next(photos) for _ in range(requests)] for _ in range(width)]
    began_s = time.perf_counter()

    async def client(own: list[bytes]) -> list[TimedAnswer]:
        return [await way(jpeg) for jpeg in own]

    answers = await asyncio.gather(*map(client, jpegs))
    return list(itertools.chain.from_iterable(answers)), time.perf_counter() - began_s


async def _ask_engine(engine: AsyncEngine, jpeg: bytes, tokens: int) -> TimedAnswer:
    answer = TimedAnswer(time.perf_counter(), [])
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


async def ask_service(
    session: aiohttp.ClientSession, url: str, config: ServiceConfig, jpeg: bytes, tokens: int
) -> TimedAnswer:
    """Have the service at `url` answer with `tokens` tokens, and time each piece."""
    answer = TimedAnswer(time.perf_counter(), [])
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
            # The first token's text may be empty, as part of a character; its chunk has the role.
            if choice["delta"] or choice["finish_reason"]:
                answer.pieces_s.append(time.perf_counter())
    return answer


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


async def forgive(asked: Awaitable[TimedAnswer]) -> TimedAnswer:
    """The answer, or one with status 0 where the connection failed."""
    try:
        return await asked
    except (aiohttp.ClientError, OSError):
        return TimedAnswer(0.0, [], status=0)


def _median(runs: list[Speed]) -> Speed:
    return Speed(
        name=runs[0].name,
        width=runs[0].width,
        ttft_ms=statistics.median(run.ttft_ms for run in runs),
        tokens_per_s=statistics.median(run.tokens_per_s for run in runs),
        largest_gap_ms=statistics.median(run.largest_gap_ms for run in runs),
    )


def _service_mb() -> float:
    """Resident memory of the processes of Serve that this process's local Ray has started."""
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
