"""Tokens a second while several requests are answered at once.

    flashvl bench throughput --preset static --random-weights

The engine always has `width` requests under way: when one ends, the next begins. `generate` answers
them in batches of `width`, in which all wait for the longest answer, and for comparison one request
alone. Times begin with images that are tensors already.
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
    build_flashvl,
    generate,
    make_photo,
    make_request,
)
from flashvl.bench.machine import Machine, measure_machine
from flashvl.bench.models import load_twins
from flashvl.bench.vllm import VllmContender
from flashvl.data.features import Tiles
from flashvl.progress import ShowProgress, ignore_progress

WIDTHS = (1, 4, 16, 64)
"""Numbers of requests at once that are measured by default."""
MEAN_TOKENS, MAX_TOKENS = 64, 256
"""Mean and maximum of the lengths of ragged answers."""


def ragged_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths of `count` answers: geometric with mean 64, cut at 256."""
    drawn = np.random.default_rng(seed).geometric(1 / MEAN_TOKENS, count)
    return np.minimum(drawn, MAX_TOKENS).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """The speed of one way at one width: medians over rounds, and in a round over requests."""

    name: str
    width: int
    """Requests answered at once."""
    ttft_ms: float
    """Time from the request to its first token."""
    tpot_ms: float
    """Time per output token after the first."""
    tokens_per_s: float
    """Tokens of all answers over the time until the last answer ends."""
    decode_tokens_per_s: float
    """Tokens a second of the steps in which all `width` requests get a token and none is
    prefilled; 0, where there are no such steps."""
    requests_per_s: float
    """Requests answered a second."""
    roofline_fraction: float
    """The time that the machine's limits allow, as a share of the time that was taken."""
    times_batches: float | None = None
    """`tokens_per_s` as a multiple of that of `generate` in batches, the median of the rounds' own
    ratios; None, where `generate` was not measured."""
    times_alone: float | None = None
    """`tokens_per_s` as a multiple of that of `generate` with one request alone, likewise."""
    decode_times_alone: float | None = None
    """`decode_tokens_per_s` as a multiple of that of `generate` with one request, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputReport:
    """The throughputs of contenders, and the limits of the machine that they were measured on."""

    machine: Machine
    contenders: list[Throughput]
    """For each width, the engine, `generate` in batches and `generate` alone."""


def measure_widths(
    model: str,
    preset: str | None = None,
    random_weights: bool = False,
    *,
    widths: Sequence[int] = WIDTHS,
    num_requests: int | None = None,
    num_tokens: int | None = None,
    rounds: int,
    on_progress: ShowProgress = ignore_progress,
) -> ThroughputReport:
    """Measure the engine beside `generate` with one model (`load_twins`) at several widths.

    Args:
        num_requests: requests at each width; by default four times the width.
        num_tokens: length of every answer; by default `ragged_lengths`.
    """
    twins = load_twins(model, preset, random_weights)
    machine = measure_machine(twins.model.dtype, twins.model.device)
    contenders = build_flashvl(twins)
    found = []
    for width in widths:
        count = num_requests or 4 * width
        lengths = ragged_lengths(count) if num_tokens is None else [num_tokens] * count
        found += measure_throughput(
            *contenders, machine, lengths, width=width, rounds=rounds, on_progress=on_progress
        )
    return ThroughputReport(machine=machine, contenders=found)


@dataclass(kw_only=True, slots=True)
class _Run:
    """One round of one way: the times of its requests, each by `perf_counter`."""

    lengths: Sequence[int]
    """Tokens of each answer."""
    asked: list[float]
    """When each request was made."""
    first: list[float]
    """When each had its first token."""
    last: list[float]
    """When each had its last token."""
    full_steps_s: list[float]
    """Duration of each step in which all `width` requests got a token and none was prefilled."""
    width: int
    """Requests at once."""

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
    on_progress: ShowProgress = ignore_progress,
) -> list[Throughput]:
    """Answer requests in each way in turn, `width` at once, after a short run to warm up.

    Args:
        lengths: tokens of each request's answer; each request is about an image of its own.
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
    on_progress: ShowProgress = ignore_progress,
) -> list[Throughput]:
    """Have the engine and vLLM answer `width` requests at once in turn, each about its own image.

    A short run of each to warm up comes first.
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
    ways: Mapping[str, Callable[[], _Run]], rounds: int, on_progress: ShowProgress
) -> dict[str, list[_Run]]:
    """The runs of each way, by the way's name."""
    runs: dict[str, list[_Run]] = {name: [] for name in ways}
    for number in range(rounds):
        for position, (name, run) in enumerate(ways.items()):
            runs[name].append(run())
            note = f"{runs[name][-1].width} at once, {name}"
            on_progress(number * len(ways) + position + 1, rounds * len(ways), note)
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
    """The engine's numbers of the requests under way, each with its place in `lengths`."""
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
    """A run in which vLLM gets all requests at once."""
    # Prepared anew for each run: vLLM keeps the features of an image while it has room for them.
    prepared = [contender.prepare(jpeg) for jpeg in jpegs]
    asked = time.perf_counter()
    times = contender.answer_all(prepared, lengths)
    all_began, first_ended = max(own[0] for own in times), min(own[-1] for own in times)
    # The steps between the last of the first tokens and the first of the last ones.
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
    """The median over the rounds of `runs` as a multiple of `others`."""
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
    """Seconds at the machine's limits: prefills at the rate of matrix products, and full decoding
    steps at the rate of reading."""
    num_steps = sum(length - 1 for length in lengths) / width
    cached = work.step_bytes(round(statistics.mean(lengths))) - work.weight_bytes
    read_bytes = num_steps * (work.weight_bytes + width * cached)
    prefill_s = len(lengths) * work.prefill_flops / (machine.gemm_tflops * 1e12)
    return prefill_s + read_bytes / (machine.read_gb_per_s * 1e9)
