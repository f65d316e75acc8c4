"""Online requests beside an offline job that fills the same engines.

    flashvl bench together

A service is asked at random times while it has nothing else to do, and beside `flashvl caption
--via-serve`, in turn. Both times the same questions come at the same moments, about JPEGs of
1024x768 that are new to the service.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import ray

from flashvl.batch.outputs import RESULTS
from flashvl.batch.service import served_engines
from flashvl.bench.contenders import make_photo
from flashvl.bench.serve import HOST, TimedAnswer, ask_service, draw_photos
from flashvl.config import DEFAULT_PROMPT
from flashvl.data.ledger.tables import OutputTable
from flashvl.data.storage import locate
from flashvl.errors import FlashVLError
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.serve.config import ServiceConfig
from flashvl.serve.run import APPLICATION, deployed

NUM_PICTURES = 256
"""Pictures of the job's table, whose rows repeat them; more than an engine has at once."""
MAX_ROWS_PER_S = 1000
"""Rows of the table for each second of the job, which must not end before it is stopped."""
START_S = 120.0
"""Seconds within which the job's first rows must be with the engines."""
SETTLE_S = 3.0
"""Seconds in which the job fills the engines before it is measured, or asked beside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Company:
    """Online requests alone and together with an offline job, and the job alone and with them."""

    requests: int
    """Requests that were asked alone, and again as many together with the job."""
    rate: float
    """Requests a second."""
    failed: int
    """Requests without an answer, alone or together."""
    ttft_p50_alone_ms: float
    """Time from a client's having a JPEG to its having the first token: the median of all."""
    ttft_p99_alone_ms: float
    """Time to the first token that 99% of the requests did not exceed."""
    ttft_p50_together_ms: float
    ttft_p99_together_ms: float
    p99_ratio: float
    """`ttft_p99_together_ms / ttft_p99_alone_ms`."""
    rows_per_s_alone: float
    """Rows that the job captioned each second while nothing else was asked: of all rounds."""
    rows_per_s_together: float


def measure_together(
    model: str,
    port: int,
    *,
    slots: int,
    tokens: int,
    num_requests: int,
    rounds: int,
    rate: float,
    on_progress: ShowProgress = ignore_progress,
) -> Company:
    """Deploy a service of `model` at `port`, and measure it; Ray must be started already.

    Args:
        slots: requests that its engine answers at once.
        tokens: tokens of each answer to an online request.
        num_requests: requests alone, and as many beside the job, at least.
        rounds: times that all three are measured in turn: requests, the job, and both.
        rate: requests a second.

    Raises:
        FlashVLError: the job failed.
    """
    config = ServiceConfig(model=model, max_num_seqs=slots)
    per_round = -(-num_requests // rounds)
    # Drawn before they are asked about, as drawing would take the service's cores.
    photos = list(itertools.islice(draw_photos(), 2 * per_round * rounds + 8))
    answers: dict[str, list[TimedAnswer]] = {"requests": [], "both": []}
    rates: dict[str, list[float]] = {"job": [], "both": []}
    plan = list(itertools.product(range(rounds), ("requests", "job", "both")))
    with tempfile.TemporaryDirectory() as scratch, deployed(config, HOST, port) as url:
        table = _write_table(Path(scratch), round(MAX_ROWS_PER_S * (per_round / rate + START_S)))
        _ask(url, config, [photos.pop() for _ in range(8)], tokens, [0.5] * 8)
        for number, (_, what) in enumerate(plan):
            on_progress(number, len(plan), what)
            rng = random.Random(number // 3)
            gaps = [rng.expovariate(rate) for _ in range(per_round)]

            def ask(what: str = what, gaps: list[float] = gaps) -> None:
                own = [photos.pop() for _ in gaps]
                answers[what] += _ask(url, config, own, tokens, gaps)

            if what == "requests":
                ask()
                continue
            with _job(config, table, Path(scratch) / f"out-{number}") as job:
                ask() if what == "both" else time.sleep(sum(gaps))
                rates[what].append(job.stop())
    good = {what: [each for each in found if each.status == 200] for what, found in answers.items()}
    (p50, p99), (p50_together, p99_together) = (
        _percentiles_ms(each.ttft_s for each in found) for found in good.values()
    )
    return Company(
        requests=per_round * rounds,
        rate=rate,
        failed=sum(len(found) - len(good[what]) for what, found in answers.items()),
        ttft_p50_alone_ms=p50,
        ttft_p99_alone_ms=p99,
        ttft_p50_together_ms=p50_together,
        ttft_p99_together_ms=p99_together,
        p99_ratio=p99_together / p99,
        rows_per_s_alone=sum(rates["job"]) / rounds,
        rows_per_s_together=sum(rates["both"]) / rounds,
    )


def _ask(
    url: str, config: ServiceConfig, photos: Sequence[bytes], tokens: int, gaps: Sequence[float]
) -> list[TimedAnswer]:
    """Ask about each photo `gaps` seconds after the one before, whatever is still unanswered."""

    async def ask() -> list[TimedAnswer]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            tasks = []
            for photo, gap in zip(photos, gaps, strict=True):
                await asyncio.sleep(gap)
                asked = ask_service(session, url, config, photo, tokens)
                tasks.append(asyncio.create_task(asked))
            return await asyncio.gather(*tasks)

    return asyncio.run(ask())


def _write_table(folder: Path, num_rows: int) -> Path:
    """A table of `num_rows` rows that name `NUM_PICTURES` files in turn."""
    for number in range(NUM_PICTURES):
        (folder / f"{number}.jpg").write_bytes(make_photo(number))
    rows = ({"image": f"{row % NUM_PICTURES}.jpg"} for row in range(num_rows))
    table = folder / "rows.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return table


class _Job:
    """`flashvl caption --via-serve` in a process of its own, as a user runs it."""

    def __init__(self, config: ServiceConfig, table: Path, output: Path):
        self.output = output
        options = [f"--output={output}", f"--model={config.model}", f"--dtype={config.dtype}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flashvl", "caption", str(table), *options]
            + [f"--via-serve={APPLICATION}", f"--prompt={DEFAULT_PROMPT}"],
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.began_s = 0.0

    def wait_until_busy(self) -> None:
        """Wait until the engines have its rows, and for `SETTLE_S` more."""
        engine = served_engines(APPLICATION)
        deadline_s = time.monotonic() + START_S
        while not engine.load.remote().result()[0]:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                self.process.kill()
                raise FlashVLError(f"the job did not start: {self.process.communicate()[1]}")
            time.sleep(0.1)
        self.began_s = time.monotonic()
        time.sleep(SETTLE_S)

    def stop(self) -> float:
        """End the job; returns the rows that it captioned each second.

        Raises:
            FlashVLError: it had ended before.
        """
        seconds = time.monotonic() - self.began_s
        is_over = self.process.poll() is not None
        self.process.send_signal(signal.SIGTERM)
        told = self.process.communicate()[1]
        if is_over or "stopped by SIGTERM" not in told:
            raise FlashVLError(f"the job ended before it was stopped: {told}")
        return OutputTable(locate(str(self.output)) / RESULTS.name).count_rows() / seconds


@contextmanager
def _job(config: ServiceConfig, table: Path, output: Path) -> Iterator[_Job]:
    job = _Job(config, table, output)
    try:
        job.wait_until_busy()
        yield job
    finally:
        job.process.kill()


def _percentiles_ms(seconds: Iterator[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    ordered = sorted(1e3 * each for each in seconds)
    return ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
