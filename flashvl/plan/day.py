"""A day of traffic, and the replicas that Serve's autoscaler would run for it."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from flashvl.errors import ConfigError
from flashvl.plan.queueing import Queue, solve_queue
from flashvl.plan.speed import Speed
from flashvl.serve import scaling

MINUTES = 60


def read_trace(file: Path) -> list[float]:
    """The requests of each hour: the last column of a CSV file, or a list in a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        text = file.read_text()
        if file.suffix in (".yaml", ".yml"):
            found = [float(each) for each in yaml.safe_load(text)]
        else:
            cells = [row[-1] for row in csv.reader(text.splitlines()) if row]
            found = [float(cell) for cell in cells[not _is_number(cells[0]) :]]
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; name a trace") from None
    except (ValueError, TypeError, IndexError, yaml.YAMLError):
        found = []
    if not found or not all(0 <= each < math.inf for each in found) or not any(found):
        raise ConfigError(
            f"{file} must hold the number of requests of each hour: the last column of a CSV file,"
            " or a list in a .yaml file"
        )
    return found


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def rates_of_minutes(requests_of_hours: Sequence[float]) -> list[float]:
    """Requests a second in each minute. They change evenly from the middle of one hour to that of
    the next; the trace begins anew after its end."""
    hours = len(requests_of_hours)
    middles = np.arange(hours) + 0.5
    minutes = (np.arange(hours * MINUTES) + 0.5) / MINUTES
    found = np.interp(minutes, middles, requests_of_hours, period=hours)
    return (found / 3600).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The replicas of each minute, and the waits."""

    replicas: list[int]
    utilization: float
    """Requests as a share of those that the replicas could answer."""
    wait_s: float
    """Seconds that 99% of the requests do not wait longer until their prompt is read."""

    @property
    def replica_hours(self) -> float:
        return sum(self.replicas) / MINUTES


def forecast_day(rates_per_s: Sequence[float], speed: Speed, least: int, most: int) -> Forecast:
    """What Serve's autoscaler does with the mean load, by the settings of `flashvl.serve.scaling`.

    It wants (requests in the engines) / target replicas, or some more where it removes them, and
    takes its time.

    Args:
        rates_per_s: requests a second in each minute.
    """
    target = scaling.TARGET_SHARE * speed.num_slots
    replicas, queues = [], []
    number = _wanted_at_first(rates_per_s[0], speed, target, least, most)
    spare_minutes = 0
    for rate in rates_per_s:
        wanted = scaling.wanted_replicas(_most_requests(rate, number, speed) / target, number)
        if wanted > number:
            number += math.ceil(scaling.UPSCALING_FACTOR * (wanted - number))
            spare_minutes = 0
        elif math.ceil(wanted) < number:
            spare_minutes += 1
            if spare_minutes * 60 > scaling.DOWNSCALE_DELAY_S:
                number -= max(int(scaling.DOWNSCALING_FACTOR * (number - wanted)), 1)
                spare_minutes = 0
        else:
            spare_minutes = 0
        number = max(least, min(most, number))
        replicas.append(number)
        queues.append(solve_queue(rate, speed, number) if rate else None)
    served = [number * speed.requests_per_s for number in replicas]
    return Forecast(
        replicas=replicas,
        utilization=sum(rates_per_s) / sum(served),
        wait_s=_wait_s(rates_per_s, queues),
    )


def _wanted_at_first(rate: float, speed: Speed, target: float, least: int, most: int) -> int:
    enough = (n for n in range(least, most) if _most_requests(rate, n, speed) <= n * target)
    return next(enough, most)


def _most_requests(rate: float, number: int, speed: Speed) -> float:
    """The most requests that an hour's chance makes the autoscaler see: two standard deviations
    more than the mean.

    With n requests each, the engines answer as fast as requests come. A deviation ends at the rate
    m = d rates / d n; the number's variance is then rate / m, and that of its mean over W seconds
    2 rate / (m^2 W) (the diffusion limit of a birth-death process). Too few engines fill up.
    """
    if rate >= number * speed.requests_per_s:
        return 2.0 * number * speed.num_slots
    requests = speed.requests_at(rate / number)
    slopes = np.gradient((0.0, *speed.rates))
    slope = max(float(np.interp(requests, np.arange(len(slopes)), slopes)), 1e-9)
    variance = rate / slope * min(1.0, 2 / (slope * scaling.LOOK_BACK_PERIOD_S))
    return number * requests + 2 * math.sqrt(variance)


def _wait_s(rates_per_s: Sequence[float], queues: Sequence[Queue | None]) -> float:
    """Seconds that 99% of all requests do not exceed; endless where the queue grows for more
    than 1% of them."""
    pairs = [pair for pair in zip(rates_per_s, queues, strict=True) if pair[0]]

    def late(seconds: float) -> float:
        late = sum(rate * (queue.late_share(seconds) if queue else 1.0) for rate, queue in pairs)
        return late / sum(rates_per_s)

    low, high = 0.0, 3600.0
    if late(high) > 0.01:
        return math.inf
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if late(middle) > 0.01 else (low, middle)
    return high
