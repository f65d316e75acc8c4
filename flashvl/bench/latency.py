"""How long one request takes, alone on the machine: to its first token, and from token to token.

    flashvl bench latency --preset static --random-weights

The contenders take turns, on the same image and question, and the answer always has the same number
of tokens.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashvl.bench.contenders import Contender, Work, make_photo
from flashvl.bench.machine import Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One answer of one contender, in seconds."""

    prepare_s: float
    """From the JPEG's bytes to tensors."""
    first_s: float
    """From there to the first token."""
    gaps_s: list[float]
    """From each token to the next."""

    @property
    def answer_s(self) -> float:
        return self.first_s + sum(self.gaps_s)


@dataclass(kw_only=True, slots=True)
class Latency:
    """Of one contender. Where nothing else is said, of the model alone, and medians over rounds."""

    name: str
    prompt_tokens: int
    """The image's among them."""
    ttft_ms: float
    """Time to the first token, from tensors."""
    ttft_mean_ms: float
    ttft_p99_ms: float
    tpot_ms: float
    """Time per output token behind the first, on average over an answer."""
    tpot_mean_ms: float
    """Over all tokens of all rounds; so is the next."""
    tpot_p99_ms: float
    tokens_per_s: float
    """Of the whole answer, from tensors."""
    prepare_ms: float
    """From JPEG bytes to tensors."""
    ttft_from_jpeg_ms: float
    tokens_per_s_from_jpeg: float
    prefill_fraction: float
    """Of the machine's rate of matrix products, that image and prompt together reach."""
    decode_fraction: float
    """Of the machine's read bandwidth, that a token's weights and cache reach."""
    roofline_fraction: float
    """The time that these two limits allow the answer, as a share of the time that it took."""
    rounds: list[Round] = field(default_factory=list)


def measure_latency(
    contenders: Sequence[Contender],
    machine: Machine,
    *,
    num_tokens: int = 128,
    rounds: int = 5,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Latency]:
    """Time `contenders` in turn; the first round warms up and does not count.

    Memory is touched for the first time in it, and a GPU's steps are recorded.
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
            on_progress(number * len(contenders) + position + 1, total)
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
