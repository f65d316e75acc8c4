"""A replayed day of traffic: Serve's own autoscaler on simulated engines, beside the forecast.

The engines are those of `serve_configs/iss.yaml` on L40s: two on a GPU, with 32 slots each. The
traffic of `day.csv` needs two to forty of them.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from flashvl.plan.config import EngineAssumptions
from flashvl.plan.day import forecast_day, rates_of_minutes, read_trace
from flashvl.plan.speed import find_speed
from flashvl.serve import scaling
from flashvl.train.plan.gpus import GPUS
from tests.support.simulated_fleet import Day, Work, replay

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

SPEED = find_speed(
    EngineAssumptions(preset="iss", gpus_per_replica=0.5, max_num_seqs=SLOTS), GPUS["l40"]
)


def settings(**changed: Any) -> AutoscalingConfig:
    values = {
        "min_replicas": 2,
        "max_replicas": 40,
        "target_ongoing_requests": scaling.TARGET_SHARE * SLOTS,
        "look_back_period_s": scaling.LOOK_BACK_PERIOD_S,
        "upscale_delay_s": scaling.UPSCALE_DELAY_S,
        "upscaling_factor": scaling.UPSCALING_FACTOR,
        "downscale_delay_s": scaling.DOWNSCALE_DELAY_S,
        "downscaling_factor": scaling.DOWNSCALING_FACTOR,
        "policy": AutoscalingPolicy(policy_function=scaling.POLICY),
    }
    return AutoscalingConfig(**values | changed)


def assert_turns_once_an_hour(day: Day) -> None:
    """Once at most in any hour, wherever it begins."""
    gaps_s = np.diff(day.turns_s)
    assert not any(gaps_s < 3600), day.turns_s


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_day_goes_as_it_was_forecast(seed: int) -> None:
    forecast = forecast_day(RATES_PER_S, SPEED, 2, 40)
    day = replay(WORK, RATES_PER_S, settings(), start_s=START_S, seed=seed)
    wait_s = float(np.quantile(day.waits_s, 0.99))
    assert min(day.targets) == 2
    assert max(day.targets) >= 36
    assert day.replica_hours == pytest.approx(forecast.replica_hours, rel=0.15)
    assert wait_s <= forecast.wait_s <= WAIT_S
    assert_turns_once_an_hour(day)


PEAK = 208_000
OTHER_DAYS = {
    "two peaks": [
        PEAK * (0.04 + 0.96 * max(math.exp(-(((hour - 8.5) / 1.6) ** 2)), 0.3 * (10 < hour < 18)))
        + 0.86 * PEAK * math.exp(-(((hour - 19) / 2) ** 2))
        for hour in range(24)
    ],
    "weekend": [PEAK * (0.45 + 0.04 * math.sin(2 * math.pi * hour / 24)) for hour in range(24)],
}
"""Requests of each hour of days with other shapes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_DAYS)
def test_days_of_other_shapes_go_as_forecast(name: str) -> None:
    rates_per_s = rates_of_minutes(OTHER_DAYS[name])
    forecast = forecast_day(rates_per_s, SPEED, 2, 40)
    day = replay(WORK, rates_per_s, settings(), start_s=START_S)
    assert day.replica_hours == pytest.approx(forecast.replica_hours, rel=0.15)
    assert float(np.quantile(day.waits_s, 0.99)) <= WAIT_S
    assert_turns_once_an_hour(day)


@pytest.mark.slow
def test_a_flash_crowd_turns_the_fleet_twice() -> None:
    """Five times as many requests within two minutes, for 40 minutes: up once, and down once. They
    wait while replicas load their model, which no setting can help."""
    usual_per_s = 0.15 * PEAK / 3600
    rates_per_s = [usual_per_s] * 480
    rates_per_s[240:282] = [3 * usual_per_s] + [5 * usual_per_s] * 41
    day = replay(WORK, rates_per_s, settings(), start_s=START_S)
    assert len(day.turns_s) <= 3
    assert_turns_once_an_hour(day)


@pytest.mark.long
def test_short_delays_without_factors_swing() -> None:
    """Three hours at a steady load that needs three of ten replicas: the number never settles, and
    requests pile up each time that too many replicas were removed. With the settings that are
    shipped, it settles."""
    rate_per_s = 3 * 0.8 * SPEED.requests_per_s
    swinging = settings(
        target_ongoing_requests=24,
        max_replicas=10,
        look_back_period_s=10,
        upscale_delay_s=5,
        upscaling_factor=1,
        downscale_delay_s=300,
        downscaling_factor=1,
        policy=AutoscalingPolicy(),
    )
    restless, calm = (
        replay(WORK, [rate_per_s] * 180, each, start_s=START_S)
        for each in (swinging, settings(max_replicas=10))
    )
    assert len(restless.turns_s) > 12
    assert len(calm.turns_s) <= 1
    assert np.quantile(restless.waits_s, 0.99) > 5 * np.quantile(calm.waits_s[-20_000:], 0.99)
