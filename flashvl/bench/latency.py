"""The time that one request takes, alone on the machine: to its first token and between tokens.

    flashvl bench latency --preset static --random-weights

The contenders take turns with the same image and question, and every answer has the same number of
tokens.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashvl.bench.contenders import Contender, Work, build_flashvl, make_photo
from flashvl.bench.machine import Machine, measure_machine
from flashvl.bench.models import load_twins
from flashvl.progress import ShowProgress, ignore_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """The times of one answer of one contender."""

    prepare_s: float
    """Seconds from the JPEG's bytes to tensors."""
    first_s: float
    """Seconds from tensors to the first token."""
    gaps_s: list[float]
    """Seconds from each token to the next."""

    @property
    def answer_s(self) -> float:
        return self.first_s + sum(self.gaps_s)


@dataclass(kw_only=True, slots=True)
class Latency:
    """The times of one contender: medians over the rounds, where a field does not say otherwise.

    They are measured from tensors on, so that they leave out the JPEG; fields that include it say
    so in their names.
    """

    name: str
    prompt_tokens: int
    """Tokens of the prompt, the image's included."""
    ttft_ms: float
    """Time to the first token."""
    ttft_mean_ms: float
    """Mean time to the first token over the rounds."""
    ttft_p99_ms: float
    """Time to the first token that 99% of the rounds do not exceed."""
    tpot_ms: float
    """Time per output token after the first, on average over an answer."""
    tpot_mean_ms: float
    """Mean time per output token over all tokens of all rounds."""
    tpot_p99_ms: float
    """Time per output token that 99% of all tokens of all rounds do not exceed."""
    tokens_per_s: float
    """Tokens of the whole answer a second."""
    prepare_ms: float
    """Time from JPEG bytes to tensors."""
    ttft_from_jpeg_ms: float
    """Time from JPEG bytes to the first token."""
    tokens_per_s_from_jpeg: float
    """Tokens of the whole answer a second, from JPEG bytes on."""
    prefill_fraction: float
    """The prefill's operations a second as a share of the machine's rate of matrix products."""
    decode_fraction: float
    """The bytes that a decoding step reads a second, as a share of the machine's bandwidth."""
    roofline_fraction: float
    """The time that these two limits allow the answer, as a share of the time that it took."""
    rounds: list[Round] = field(default_factory=list)
    """Each round's own times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyReport:
    """The latencies of contenders, and the limits of the machine on which they were measured."""

    machine: Machine
    contenders: list[Latency]


def compare_with_generate(
    model: str,
    preset: str | None = None,
    random_weights: bool = False,
    *,
    num_tokens: int,
    rounds: int,
    on_progress: ShowProgress = ignore_progress,
) -> LatencyReport:
    """Time the engine and `generate` with one model (`load_twins`)."""
    twins = load_twins(model, preset, random_weights)
    machine = measure_machine(twins.model.dtype, twins.model.device)
    latencies = measure_latency(
        build_flashvl(twins),
        machine,
        num_tokens=num_tokens,
        rounds=rounds,
        on_progress=on_progress,
    )
    return LatencyReport(machine=machine, contenders=latencies)


def measure_latency(
    contenders: Sequence[Contender],
    machine: Machine,
    *,
    num_tokens: int = 128,
    rounds: int = 5,
    on_progress: ShowProgress = ignore_progress,
) -> list[Latency]:
    """Time `contenders` in turn.

    The first round does not count: memory is touched for the first time in it, and a GPU's steps
    are recorded.
    """
    jpeg = make_photo(0)
    works = [contender.count_work(jpeg) for contender in contenders]
    measured: list[list[Round]] = [[] for _ in contenders]
    total = (rounds + 1) * len(contenders)
    for number in range(rounds + 1):
        for position, contender in enumerate(contenders):
            took = _time_answer(contender, jpeg, num_tokens)
            if number:
                measured[position].append(took)
            on_progress(number * len(contenders) + position + 1, total, contender.name)
    return [
        _summarize(contender.name, work, taken, num_tokens, machine)
        for contender, work, taken in zip(contenders, works, measured, strict=True)
    ]


def _time_answer(contender: Contender, jpeg: bytes, num_tokens: int) -> Round:
    start = time.perf_counter()
    prepared = contender.prepare(jpeg)
    ready = time.perf_counter()
    first, *others = contender.answer(prepared, num_tokens)
    gaps = np.diff([first, *others]).tolist()
    return Round(prepare_s=ready - start, first_s=first - ready, gaps_s=gaps)


def _summarize(
    name: str, work: Work, rounds: list[Round], num_tokens: int, machine: Machine
) -> Latency:
    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    firsts = [each.first_s for each in rounds]
    gaps = [gap for each in rounds for gap in each.gaps_s]
    first_s, step_s = median(lambda r: r.first_s), median(lambda r: statistics.mean(r.gaps_s))
    best_first_s = work.prefill_flops / (machine.gemm_tflops * 1e12)
    best_step_s = work.step_bytes(num_tokens) / (machine.read_gb_per_s * 1e9)
    answer_s = median(lambda r: r.answer_s)
    return Latency(
        name=name,
        prompt_tokens=work.prompt_tokens,
        ttft_ms=first_s * 1e3,
        ttft_mean_ms=statistics.mean(firsts) * 1e3,
        ttft_p99_ms=float(np.percentile(firsts, 99)) * 1e3,
        tpot_ms=step_s * 1e3,
        tpot_mean_ms=statistics.mean(gaps) * 1e3,
        tpot_p99_ms=float(np.percentile(gaps, 99)) * 1e3,
        tokens_per_s=num_tokens / answer_s,
        prepare_ms=median(lambda r: r.prepare_s) * 1e3,
        ttft_from_jpeg_ms=median(lambda r: r.prepare_s + r.first_s) * 1e3,
        tokens_per_s_from_jpeg=num_tokens / median(lambda r: r.prepare_s + r.answer_s),
        prefill_fraction=best_first_s / first_s,
        decode_fraction=best_step_s / step_s,
        roofline_fraction=(best_first_s + (num_tokens - 1) * best_step_s) / answer_s,
        rounds=rounds,
    )
