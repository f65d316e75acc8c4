"""How many tokens a second come out while several requests are answered at once.

    flashvl bench throughput --preset static --random-weights

Clients ask `width` requests at once, each the next as soon as it has its answer. The engine answers
them as they come; plain `generate` in batches of that width, where all wait for the longest answer,
and beside it one request alone. All begin with images that are tensors.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flashvl.bench.contenders import (
    EngineContender,
    GenerateContender,
    Work,
    generate,
    make_photo,
    make_request,
)
from flashvl.bench.machine import Machine
from flashvl.bench.vllm import VllmContender
from flashvl.data.features import Tiles

OnProgress = Callable[[int, int], None]

MEAN_TOKENS, MAX_TOKENS = 64, 256


def ragged_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths of `count` answers: geometric, mean 64, at most 256."""
    drawn = np.random.default_rng(seed).geometric(1 / MEAN_TOKENS, count)
    return np.minimum(drawn, MAX_TOKENS).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Of one way at one width; medians over rounds, in them over requests."""

    name: str
    width: int
    """Requests answered at once."""
    ttft_ms: float
    """From the moment that a request is asked."""
    tpot_ms: float
    tokens_per_s: float
    """Asked for, over the time until all requests are answered."""
    decode_tokens_per_s: float
    """In steps in which all `width` requests get a token and none is prefilled; 0 without any."""
    requests_per_s: float
    roofline_fraction: float
    """The time that the machine's limits allow, as a share of the time that it took."""
    times_batches: float | None = None
    """`tokens_per_s` as a multiple of that of `generate` in batches; median of rounds. None, as the
    next two, where `generate` was not measured."""
    times_alone: float | None = None
    """And of that of `generate` with one request at a time."""
    decode_times_alone: float | None = None
    """`decode_tokens_per_s`, likewise."""


@dataclass(kw_only=True, slots=True)
class _Run:
    """Of all requests, in one way: when each was asked, got its first token and its last."""

    lengths: Sequence[int]
    asked: list[float]
    first: list[float]
    last: list[float]
    full_steps_s: list[float]
    """Of each step in which the whole width decoded."""
    width: int

    @property
    def tokens_per_s(self) -> float:
        return sum(self.lengths) / (max(self.last) - min(self.asked))

    @property
    def decode_tokens_per_s(self) -> float:
        if not self.full_steps_s:
            return 0.0
        return self.width * len(self.full_steps_s) / sum(self.full_steps_s)

    @property
    def ttft_s(self) -> float:
        return statistics.median(b - a for a, b in zip(self.asked, self.first, strict=True))

    @property
    def tpot_s(self) -> float:
        spans = zip(self.first, self.last, self.lengths, strict=True)
        return statistics.median([(b - a) / (n - 1) for a, b, n in spans if n > 1] or [0.0])


def measure_throughput(
    engine: EngineContender,
    plain: GenerateContender,
    machine: Machine,
    lengths: Sequence[int],
    *,
    width: int,
    rounds: int = 3,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Throughput]:
    """Answer requests of `lengths` in each way in turn, `width` at once, after a short warm-up.

    Args:
        lengths: tokens of each answer; each is about an image of its own.
    """
    jpegs = [make_photo(seed) for seed in range(len(lengths))]
    work = plain.count_work(jpegs[0])
    tiles = [engine.prepare(jpeg) for jpeg in jpegs]
    inputs = [plain.prepare(jpeg) for jpeg in jpegs]
    mean = [round(statistics.mean(lengths))]
    ways: dict[str, Callable[[], _Run]] = {
        "flashvl": lambda: _run_engine(engine, tiles, lengths, width),
        "generate, batches": lambda: _run_batches(plain, inputs, lengths, width),
        "generate, alone": lambda: _run_batches(plain, inputs[:1], mean, 1),
    }
    few = [2] * len(tiles[:width])
    _run_engine(engine, tiles[:width], few, width)
    _run_batches(plain, inputs[:width], few, width)
    runs = _take_turns(ways, rounds, on_progress)
    batches, alone = runs["generate, batches"], runs["generate, alone"]
    return [
        dataclasses.replace(
            _summarize(name, own, work, machine),
            times_batches=_times(lambda run: run.tokens_per_s, own, batches),
            times_alone=_times(lambda run: run.tokens_per_s, own, alone),
            decode_times_alone=_times(lambda run: run.decode_tokens_per_s, own, alone),
        )
        for name, own in runs.items()
    ]


def compare_at_once(
    engine: EngineContender,
    vllm: VllmContender,
    machine: Machine,
    *,
    width: int,
    num_tokens: int,
    rounds: int = 3,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Throughput]:
    """The engine and vLLM in turn: `width` requests at once, about an image each.

    A short run of each warms up.
    """
    jpegs = [make_photo(seed) for seed in range(width)]
    lengths = [num_tokens] * width
    tiles = [engine.prepare(jpeg) for jpeg in jpegs]
    _run_engine(engine, tiles, [2] * width, width)
    _run_vllm(vllm, jpegs, [2] * width)
    ways = {
        engine.name: lambda: _run_engine(engine, tiles, lengths, width),
        vllm.name: lambda: _run_vllm(vllm, jpegs, lengths),
    }
    work = vllm.count_work(jpegs[0])
    runs = _take_turns(ways, rounds, on_progress)
    return [_summarize(name, own, work, machine) for name, own in runs.items()]


def _take_turns(
    ways: Mapping[str, Callable[[], _Run]], rounds: int, on_progress: OnProgress
) -> dict[str, list[_Run]]:
    """The runs of each way, by its name."""
    runs: dict[str, list[_Run]] = {name: [] for name in ways}
    for number in range(rounds):
        for position, (name, run) in enumerate(ways.items()):
            runs[name].append(run())
            on_progress(number * len(ways) + position + 1, rounds * len(ways))
    return runs


def _run_engine(
    contender: EngineContender, tiles: Sequence[Tiles], lengths: Sequence[int], width: int
) -> _Run:
    engine = contender.engine
    engine.image_features.clear()
    count = len(lengths)
    run = _Run(
        lengths=lengths,
        asked=[0.0] * count,
        first=[0.0] * count,
        last=[0.0] * count,
        full_steps_s=[],
        width=width,
    )
    numbers: dict[int, int] = {}
    """The engine's number of a request -> its place in `lengths`."""
    num_asked = 0
    while num_asked < count or numbers:
        while num_asked < count and len(numbers) < width:
            request = make_request(tiles[num_asked], lengths[num_asked])
            run.asked[num_asked] = time.perf_counter()
            numbers[engine.add(request, is_streamed=True)] = num_asked
            num_asked += 1
        scheduler = engine.scheduler
        is_prefilling = bool(scheduler.waiting or scheduler.prefilling)
        num_decoding = len(scheduler.decoding)
        before = time.perf_counter()
        engine.step()
        now = time.perf_counter()
        if num_decoding == width and not is_prefilling:
            run.full_steps_s.append(now - before)
        for number, place in list(numbers.items()):
            for delta in engine.take(number):
                run.first[place] = run.first[place] or now
                if delta.completion is not None:
                    run.last[place] = now
                    del numbers[number]
    return run


def _run_batches(
    contender: GenerateContender,
    inputs: Sequence[dict[str, torch.Tensor]],
    lengths: Sequence[int],
    width: int,
) -> _Run:
    run = _Run(lengths=lengths, asked=[], first=[], last=[], full_steps_s=[], width=width)
    for start in range(0, len(lengths), width):
        rows, wanted = inputs[start : start + width], lengths[start : start + width]
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        run.asked += [time.perf_counter()] * len(rows)
        times = generate(contender.model, batch, max(wanted))
        run.first += [times[0]] * len(rows)
        run.last += [times[length - 1] for length in wanted]
        if len(rows) == width:
            run.full_steps_s += np.diff(times[: min(wanted)]).tolist()
    return run


def _run_vllm(contender: VllmContender, jpegs: Sequence[bytes], lengths: Sequence[int]) -> _Run:
    """All at once."""
    # Anew each time: vLLM keeps what it has made of an image for as long as there is room.
    prepared = [contender.prepare(jpeg) for jpeg in jpegs]
    asked = time.perf_counter()
    times = contender.answer_all(prepared, lengths)
    all_began, first_ended = max(own[0] for own in times), min(own[-1] for own in times)
    # Every step in which all have had their first token and none its last before.
    steps = sorted({at for own in times for at in own if all_began <= at <= first_ended})
    return _Run(
        lengths=lengths,
        asked=[asked] * len(lengths),
        first=[own[0] for own in times],
        last=[own[-1] for own in times],
        full_steps_s=np.diff(steps).tolist(),
        width=len(lengths),
    )


def _times(of: Callable[[_Run], float], runs: list[_Run], others: list[_Run]) -> float:
    """`runs` as a multiple of `others`, round by round; the median."""
    ratios = (of(a) / of(b) if of(b) else 0.0 for a, b in zip(runs, others, strict=True))
    return statistics.median(ratios)


def _summarize(name: str, runs: list[_Run], work: Work, machine: Machine) -> Throughput:
    def median(of: Callable[[_Run], float]) -> float:
        return statistics.median(map(of, runs))

    tokens_per_s = median(lambda run: run.tokens_per_s)
    lengths, width = runs[0].lengths, runs[0].width
    best_s = _best_s(work, machine, lengths, width)
    return Throughput(
        name=name,
        width=width,
        ttft_ms=median(lambda run: run.ttft_s) * 1e3,
        tpot_ms=median(lambda run: run.tpot_s) * 1e3,
        tokens_per_s=tokens_per_s,
        decode_tokens_per_s=median(lambda run: run.decode_tokens_per_s),
        requests_per_s=tokens_per_s / statistics.mean(lengths),
        roofline_fraction=best_s * tokens_per_s / sum(lengths),
    )


def _best_s(work: Work, machine: Machine, lengths: Sequence[int], width: int) -> float:
    """Every prefill at the rate of matrix products; every step full, at the rate of reading."""
    num_steps = sum(length - 1 for length in lengths) / width
    cached = work.step_bytes(round(statistics.mean(lengths))) - work.weight_bytes
    read_bytes = num_steps * (work.weight_bytes + width * cached)
    prefill_s = len(lengths) * work.prefill_flops / (machine.gemm_tflops * 1e12)
    return prefill_s + read_bytes / (machine.read_gb_per_s * 1e9)
