"""What inference will take: replicas, GPUs, hours and money, for a service or a captioning job.

It needs neither Ray nor a GPU. What it leaves out: replicas that are to spare for when a node is
lost, and CPUs, disks and traffic, which cost little beside GPUs.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashvl.config import pool_of
from flashvl.errors import ConfigError
from flashvl.model.presets import build_config
from flashvl.plan.config import CaptioningDemand, EngineAssumptions, ServingDemand
from flashvl.plan.day import forecast_day, rates_of_minutes, read_trace
from flashvl.plan.prices import choose_gpus, read_prices
from flashvl.plan.queueing import Queue, solve_queue
from flashvl.plan.speed import Speed, find_speed
from flashvl.train.plan.gpus import find_gpu
from flashvl.train.plan.plan import DECODE_MS, RESIZE_MS
from flashvl.train.plan.row_sizes import IMAGE_SIZE

START_MINUTES = 2.0
"""Minutes until the engines of a job have loaded their model."""
MOST_REPLICAS = 1000
"""Replicas that are tried at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetPlan:
    """A fleet of engines on GPUs of one kind."""

    gpu: str
    speed: Speed
    replicas: int
    """Engines; the most of a day, where their number follows the load."""
    gpus: int
    hours: float
    """Hours for which the plan holds: a job's, a trace's, or a day."""
    gpu_hours: float
    utilization: float
    """Work as a share of what the engines could do in that time."""
    price: float | None
    cores: float
    """CPU cores that decode and resize the images meanwhile, at the peak."""
    wait_ms: float | None = None
    """Milliseconds that 99% of the requests do not wait longer until their prompt is read, which
    `flashvl_request_queue_time_seconds` measures; None for a job."""
    ttft_ms: float | None = None
    """Milliseconds to the first token, for 99% of the requests; None: not known."""
    fixed_gpu_hours: float | None = None
    """GPU-hours of as many replicas all day long as the peak takes; None without a trace."""

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price * self.gpu_hours

    def describe(self) -> dict[str, Any]:
        """The plan for JSON."""
        speed = {
            "requests_per_s": self.speed.requests_per_s,
            "prefill_s": self.speed.prefill_s,
            "step_s": self.speed.step_s,
            "num_slots": self.speed.num_slots,
            "source": self.speed.source,
        }
        values = {name: value for name, value in asdict(self).items() if name != "speed"}
        return values | {"speed": speed, "cost": self.cost}


def plan_serving(demand: ServingDemand) -> list[FleetPlan]:
    """A service's fleet on each kind of GPU, the cheapest first.

    Raises:
        ConfigError: a file cannot be used, or no number of replicas meets the targets.
    """
    return _on_each_gpu(demand, lambda gpu, price: _plan_serving(demand, gpu, price))


def plan_captioning(demand: CaptioningDemand) -> list[FleetPlan]:
    """A captioning job's fleet on each kind of GPU, the cheapest first.

    Raises:
        ConfigError: a file cannot be used, or the time is too short for any number of GPUs.
    """
    return _on_each_gpu(demand, lambda gpu, price: _plan_captioning(demand, gpu, price))


def _on_each_gpu(
    demand: EngineAssumptions, plan: Callable[[str, float | None], FleetPlan]
) -> list[FleetPlan]:
    prices = read_prices(Path(demand.prices)) if demand.prices is not None else None
    kinds = choose_gpus(demand.gpu, prices)
    if len(kinds) > 1 and (demand.measured is not None or demand.rate is not None):
        raise ConfigError(
            f"rates that were measured are those of one GPU; name it by --gpu: {', '.join(kinds)}"
        )
    plans = [plan(kind, prices[kind] if prices is not None else None) for kind in kinds]
    return sorted(plans, key=lambda each: each.cost or 0.0)


def _plan_captioning(demand: CaptioningDemand, gpu: str, price: float | None) -> FleetPlan:
    speed = find_speed(demand, find_gpu(gpu))
    start_hours = START_MINUTES / 60
    if demand.gpus is None:
        if demand.hours <= start_hours:
            raise ConfigError(
                f"hours ({demand.hours:g}) must be more than the {START_MINUTES:g} minutes in which"
                " engines start; give more"
            )
        rate = demand.rows / (3600 * (demand.hours - start_hours))
        replicas = math.ceil(rate / speed.requests_per_s)
        gpus = math.ceil(replicas * demand.gpus_per_replica)
    else:
        gpus = demand.gpus
        replicas = int(gpus / demand.gpus_per_replica)
    work_hours = demand.rows / (replicas * speed.requests_per_s) / 3600
    hours = work_hours + start_hours
    return FleetPlan(
        gpu=gpu,
        speed=speed,
        replicas=replicas,
        gpus=gpus,
        hours=hours,
        gpu_hours=hours * gpus,
        utilization=work_hours / hours,
        price=price,
        cores=_cores(demand, replicas * speed.requests_per_s),
    )


def _plan_serving(demand: ServingDemand, gpu: str, price: float | None) -> FleetPlan:
    speed = find_speed(demand, find_gpu(gpu))
    if demand.trace is not None:
        return _plan_day(demand, speed, gpu, price)
    assert demand.requests_per_s is not None
    rate = demand.requests_per_s
    replicas, queue = _fewest(demand, speed, rate)
    gpus = math.ceil(replicas * demand.gpus_per_replica)
    return FleetPlan(
        gpu=gpu,
        speed=speed,
        replicas=replicas,
        gpus=gpus,
        hours=24.0,
        gpu_hours=24.0 * gpus,
        utilization=queue.utilization,
        price=price,
        cores=_cores(demand, rate),
        wait_ms=1000 * queue.wait_s,
        ttft_ms=_ttft_ms(queue.wait_s, speed),
    )


def _plan_day(demand: ServingDemand, speed: Speed, gpu: str, price: float | None) -> FleetPlan:
    assert demand.trace is not None
    rates = rates_of_minutes(read_trace(Path(demand.trace)))
    day = forecast_day(rates, speed, *pool_of(demand.replicas))
    if 1000 * day.wait_s > demand.wait_ms:
        raise ConfigError(
            f"on {gpu}, 99% of the requests wait {1000 * day.wait_s:.0f} ms at most, and wait_ms is"
            f" {demand.wait_ms:g}; raise it, or allow more replicas than {demand.replicas}"
        )
    share, most = demand.gpus_per_replica, max(day.replicas)
    return FleetPlan(
        gpu=gpu,
        speed=speed,
        replicas=most,
        gpus=math.ceil(most * share),
        hours=len(rates) / 60,
        gpu_hours=day.replica_hours * share,
        utilization=day.utilization,
        price=price,
        cores=_cores(demand, max(rates)),
        wait_ms=1000 * day.wait_s,
        ttft_ms=_ttft_ms(day.wait_s, speed),
        fixed_gpu_hours=_fewest(demand, speed, max(rates))[0] * share * len(rates) / 60,
    )


def _fewest(demand: ServingDemand, speed: Speed, rate: float) -> tuple[int, Queue]:
    """The fewest replicas that meet the targets, and their queue.

    Raises:
        ConfigError: no number of replicas meets the targets.
    """
    if demand.ttft_ms is not None and speed.prefill_s is None:
        raise ConfigError(
            "ttft_ms needs the time to read a prompt, which one rate does not tell; leave it out,"
            " or give a file that flashvl bench throughput or serve has written as --measured"
        )
    alone_ms = 1000 * ((speed.prefill_s or 0.0) + speed.step_s)
    if demand.ttft_ms is not None and demand.ttft_ms < alone_ms:
        raise ConfigError(
            f"ttft_ms ({demand.ttft_ms:g}) is less than the {alone_ms:.0f} ms of a request alone;"
            " raise it, or plan for a faster GPU or a preset with fewer tiles"
        )
    for replicas in range(max(math.ceil(rate / speed.requests_per_s), 1), MOST_REPLICAS):
        queue = solve_queue(rate, speed, replicas)
        if queue is None or 1000 * queue.wait_s > demand.wait_ms:
            continue
        ttft_ms = _ttft_ms(queue.wait_s, speed)
        if demand.ttft_ms is None or (ttft_ms is not None and ttft_ms <= demand.ttft_ms):
            return replicas, queue
    raise ConfigError(
        f"{MOST_REPLICAS:,} replicas do not meet wait_ms ({demand.wait_ms:g}); raise it, or plan"
        " for a faster GPU"
    )


def _ttft_ms(wait_s: float, speed: Speed) -> float | None:
    """Milliseconds to the first token, for 99% of the requests; None: not known."""
    return None if speed.prefill_s is None else 1000 * (wait_s + speed.prefill_s)


def _cores(demand: EngineAssumptions, requests_per_s: float) -> float:
    tiles = build_config(demand.preset).tiling_rule.num_tiles(IMAGE_SIZE)
    return requests_per_s * demand.images * (DECODE_MS + RESIZE_MS * tiles) / 1000
