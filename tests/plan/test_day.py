"""A replayed day of traffic: Serve's own autoscaler on simulated engines, beside the forecast.

The engines are those of `serve_configs/iss.yaml` on L40s: two on a GPU, with 32 slots each. The
traffic of `day.csv` needs two to forty of them.
"""

from pathlib import Path

import numpy as np
import pytest
from ray.serve.config import AutoscalingConfig

from flashvl.plan.config import EngineAssumptions
from flashvl.plan.day import forecast_day, rates_of_minutes, read_trace
from flashvl.plan.speed import find_speed
from flashvl.serve import scaling
from flashvl.train.plan.gpus import GPUS
from tests.support.simulated_fleet import Work, replay

RATES_PER_S = rates_of_minutes(read_trace(Path(__file__).with_name("day.csv")))
SLOTS = 32
WAIT_S = 4.0
"""Seconds that 99% of the requests may wait; reading the prompts of the others takes most of it."""
START_S = 120.0
"""Seconds until a new replica has loaded its model."""
WORK = Work(
    slots=SLOTS,
    # 16.7 TFLOP for five tiles and 2,980 tokens, at 40% of half of 181 TFLOP/s
    prefill_s=0.462,
    # 3.09 GB of weights, and 28,672 bytes for each token, at 50% of half of 864 GB/s
    step_s=lambda number: (3.087e9 + number * 3044 * 28672) / 216e9,
    group=1,  # a prompt is longer than what the engine reads in one step
    mean_tokens=128,
)


def settings(**changed: float) -> AutoscalingConfig:
    values = {
        "min_replicas": 2,
        "max_replicas": 40,
        "target_ongoing_requests": scaling.TARGET_SHARE * SLOTS,
        "look_back_period_s": scaling.LOOK_BACK_PERIOD_S,
        "upscale_delay_s": scaling.UPSCALE_DELAY_S,
        "upscaling_factor": scaling.UPSCALING_FACTOR,
        "downscale_delay_s": scaling.DOWNSCALE_DELAY_S,
        "downscaling_factor": scaling.DOWNSCALING_FACTOR,
    }
    return AutoscalingConfig(**values | changed)


@pytest.mark.slow
def test_a_day_goes_as_it_was_forecast() -> None:
    assumptions = EngineAssumptions(preset="iss", gpus_per_replica=0.5, max_num_seqs=SLOTS)
    forecast = forecast_day(RATES_PER_S, find_speed(assumptions, GPUS["l40"]), 2, 40)
    day = replay(WORK, RATES_PER_S, settings(), start_s=START_S)
    wait_s = float(np.quantile(day.waits_s, 0.99))
    assert min(day.targets) == 2
    assert max(day.targets) >= 36
    assert day.replica_hours == pytest.approx(forecast.replica_hours, rel=0.15)
    assert wait_s <= forecast.wait_s <= WAIT_S
    assert sum(day.turns) <= len(day.turns)  # one change of direction an hour


@pytest.mark.long
def test_short_delays_without_factors_swing() -> None:
    """Three hours at a steady load that needs three of ten replicas: the number never settles, and
    requests pile up each time that too many replicas were removed. With the settings that are
    shipped, it settles."""
    rate_per_s = 3 * 0.8 * find_rate()
    swinging = settings(
        target_ongoing_requests=24,
        max_replicas=10,
        look_back_period_s=10,
        upscale_delay_s=5,
        upscaling_factor=1,
        downscale_delay_s=300,
        downscaling_factor=1,
    )
    restless, calm = (
        replay(WORK, [rate_per_s] * 180, each, start_s=START_S)
        for each in (swinging, settings(max_replicas=10))
    )
    assert sum(restless.turns) > 12
    assert sum(calm.turns) <= 3
    assert np.quantile(restless.waits_s, 0.99) > 5 * np.quantile(calm.waits_s[-20_000:], 0.99)


def find_rate() -> float:
    """Answers a second of an engine with all slots in use."""
    assumptions = EngineAssumptions(preset="iss", gpus_per_replica=0.5, max_num_seqs=SLOTS)
    return find_speed(assumptions, GPUS["l40"]).requests_per_s
