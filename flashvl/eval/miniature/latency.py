"""Figure 1 and A.4 in miniature: whether latencies by tiling are in the paper's order."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashvl.eval.miniature.verdicts import Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """The times of a model's answers about one image."""

    name: str
    visual_tokens: int
    """Visual tokens of the image."""
    times_ms: list[list[float]]
    """Time of each token since the model got the image's tensors, by round; the models take turns
    in a round."""

    @property
    def median_first_ms(self) -> float:
        return statistics.median(map(first_ms, self.times_ms))

    @property
    def median_step_ms(self) -> float:
        return statistics.median(map(step_ms, self.times_ms))

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * len(self.times_ms[0]) / statistics.median(map(answer_ms, self.times_ms))


def first_ms(times: Sequence[float]) -> float:
    """The time to the first token (TTFT)."""
    return times[0]


def step_ms(times: Sequence[float]) -> float:
    """The time of a token after the first (TPOT)."""
    return (times[-1] - times[0]) / (len(times) - 1)


def answer_ms(times: Sequence[float]) -> float:
    """The time of the whole answer."""
    return times[-1]


CLAIMS: tuple[tuple[str, Callable[[Sequence[float]], float], str, str, str], ...] = (
    ("static has its first token before dynamic", first_ms, "static", "dynamic", "0.04, 0.13 s"),
    ("dynamic has its first token before ISS", first_ms, "dynamic", "ISS", "0.13, 0.18 s"),
    ("static answers faster than dynamic", answer_ms, "static", "dynamic", "60.7, 51.5 tokens/s"),
    ("dynamic answers faster than ISS", answer_ms, "dynamic", "ISS", "51.5, 48.7 tokens/s"),
)
"""Claims of the paper: what is timed, the model that is faster, the other one, and its figures."""


def compare_latencies(timed: Sequence[Timed]) -> list[Comparison]:
    """The claims, by pairs of answers of the same round; differences are in milliseconds."""
    by_name = {each.name: each.times_ms for each in timed}
    found = []
    for claim, measure, fast, slow, paper in CLAIMS:
        pairs = list(zip(map(measure, by_name[fast]), map(measure, by_name[slow]), strict=True))
        found.append(
            Comparison(
                claim=claim,
                paper=paper,
                differences=(statistics.median(later - sooner for sooner, later in pairs),),
                wins=sum(sooner < later for sooner, later in pairs),
                losses=sum(sooner > later for sooner, later in pairs),
            )
        )
    return found
