"""How fast one engine answers: measured by `flashvl bench`, or allowed by the GPU's peaks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashvl.errors import ConfigError
from flashvl.model import FlashVLConfig
from flashvl.model.presets import build_config
from flashvl.plan.config import EngineAssumptions
from flashvl.train.flops import forward_flops
from flashvl.train.plan.gpus import Gpu
from flashvl.train.plan.rollouts import step_bytes
from flashvl.train.plan.row_sizes import IMAGE_SIZE

MEASURED = "measured by flashvl bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """The speed of one engine."""

    rates: tuple[float, ...]
    """Answers a second with one request under way, with two ..., with all slots in use."""
    prefill_s: float | None
    """Seconds to encode the images of a prompt and to read it; None: not known."""
    step_s: float
    """Seconds of a decoding step with all slots in use; 0: not known."""
    source: str
    """Where the numbers come from."""

    @property
    def num_slots(self) -> int:
        return len(self.rates)

    @property
    def requests_per_s(self) -> float:
        """Answers a second with all slots in use."""
        return self.rates[-1]

    def fleet_rates(self, replicas: int) -> npt.NDArray[np.float64]:
        """(replicas * slots,): answers a second of several engines, with one request under way,
        with two ..., spread evenly."""
        each = np.arange(1, replicas * self.num_slots + 1) / replicas
        return replicas * np.interp(each, np.arange(self.num_slots + 1), (0.0, *self.rates))

    def requests_at(self, requests_per_s: float) -> float:
        """Requests under way in an engine that answers `requests_per_s`, less than it can."""
        return float(np.interp(requests_per_s, (0.0, *self.rates), np.arange(self.num_slots + 1)))


def find_speed(assumptions: EngineAssumptions, gpu: Gpu) -> Speed:
    """The speed of an engine on this GPU, or on its share of it.

    Raises:
        ConfigError: the preset is unknown, or the file of measured rates cannot be used.
    """
    if assumptions.measured is not None:
        return read_speed(Path(assumptions.measured), assumptions.max_num_seqs)
    if assumptions.rate is not None:
        return _one_rate(assumptions.rate, assumptions.max_num_seqs, None, "given by --rate")
    return roofline_speed(build_config(assumptions.preset), assumptions, gpu)


def roofline_speed(config: FlashVLConfig, assumptions: EngineAssumptions, gpu: Gpu) -> Speed:
    """What the GPU's peaks allow.

    With n requests under way, an answer of L tokens takes (Williams et al. 2009, Roofline)

        n prefill + (L - 1) step(n)    prefill = operations / (mfu x peak),
                                       step(n) = bytes / (bandwidth_share x bandwidth):

    while an answer is under way, the prompts of n - 1 others are read, and its own.
    """
    share = assumptions.gpus_per_replica
    tiles = assumptions.images * config.tiling_rule.num_tiles(IMAGE_SIZE)
    prompt = assumptions.text_tokens + tiles * config.image_seq_length
    parts = forward_flops(config, prompt, tiles, num_labels=1)
    flops = sum(part.total for part in parts.values())
    prefill_s = flops / (assumptions.mfu * share * gpu.bf16_tflops * 1e12)
    bandwidth = assumptions.bandwidth_share * share * gpu.bandwidth_gb_per_s * 1e9
    tokens = assumptions.answer_tokens
    counts = np.arange(1, assumptions.max_num_seqs + 1)
    steps = [step_bytes(config, n * (prompt + tokens / 2)) / bandwidth for n in counts]
    rates = counts / (counts * prefill_s + (tokens - 1) * np.array(steps))
    return Speed(
        rates=tuple(rates.tolist()),
        prefill_s=prefill_s,
        step_s=steps[-1],
        source=f"roofline: {assumptions.mfu:.0%} of {gpu.bf16_tflops:g} TFLOP/s,"
        f" {assumptions.bandwidth_share:.0%} of {gpu.bandwidth_gb_per_s} GB/s"
        + (f", {share:g} of a GPU for each engine" if share != 1 else ""),
    )


def read_speed(file: Path, max_num_seqs: int) -> Speed:
    """What `flashvl bench throughput`, `serve` or `caption` has measured and written with `--json`.

    Raises:
        ConfigError: the file cannot be read, or is none of these.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise ConfigError(f"cannot read {file}: {reason}; name a file of flashvl bench") from None
    try:
        return _as_speed(found, max_num_seqs)
    except (KeyError, TypeError, IndexError):
        raise ConfigError(
            f"{file} holds no rates of requests; name a file that flashvl bench throughput, serve"
            " (with its overload) or caption has written"
        ) from None


def _as_speed(found: dict[str, Any], max_num_seqs: int) -> Speed:
    if "machine" in found:
        rows = [each for each in found["contenders"] if each["name"] == "flashvl"]
        rows = sorted((row for row in rows if row["width"] <= max_num_seqs), key=_width)
        tokens = rows[-1]["tokens_per_s"] / rows[-1]["requests_per_s"]
        return Speed(
            rates=_interpolate(
                [row["width"] for row in rows], [row["requests_per_s"] for row in rows]
            ),
            prefill_s=rows[0]["ttft_ms"] / 1000,
            step_s=rows[-1]["tpot_ms"] / 1000,
            source=f"{MEASURED} throughput on {found['machine']['device']}, answers of"
            f" {tokens:.0f} tokens",
        )
    if "overload" in found:
        alone = min((each for each in found["speeds"] if each["name"] == "service"), key=_width)
        rate, first_s = found["overload"]["capacity_per_s"], alone["ttft_ms"] / 1000
        return _one_rate(rate, max_num_seqs, first_s, f"{MEASURED} serve, HTTP included")
    return _one_rate(found["job"], max_num_seqs, None, f"{MEASURED} caption, decoding included")


def _width(row: dict[str, Any]) -> int:
    return int(row["width"])


def _interpolate(widths: Sequence[int], rates: Sequence[float]) -> tuple[float, ...]:
    """Rates of every width up to the greatest one, from those of some."""
    return tuple(np.interp(range(1, widths[-1] + 1), (0, *widths), (0.0, *rates)).tolist())


def _one_rate(rate: float, num_slots: int, prefill_s: float | None, source: str) -> Speed:
    """An engine of which only the rate when it is full is known: answers then always take as long
    as in a full engine, which is the slowest."""
    rates = tuple(rate * number / num_slots for number in range(1, num_slots + 1))
    return Speed(rates=rates, prefill_s=prefill_s, step_s=0.0, source=source)
