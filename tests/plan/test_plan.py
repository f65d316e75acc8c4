"""Plans of inference: rooflines computed by hand, measured files, prices, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flashvl.cli import app
from flashvl.errors import ConfigError
from flashvl.plan.config import CaptioningDemand, EngineAssumptions, ServingDemand
from flashvl.plan.day import forecast_day, rates_of_minutes, read_trace
from flashvl.plan.plan import FleetPlan, plan_captioning, plan_serving
from flashvl.plan.queueing import solve_queue
from flashvl.plan.report import describe_captioning, describe_serving
from flashvl.plan.speed import find_speed
from flashvl.train.plan.gpus import GPUS

ROOT = Path(__file__).resolve().parents[2]
DAY = Path(__file__).with_name("day.csv")
PRICES = str(ROOT / "cluster" / "prices.yaml")


@pytest.mark.parametrize(
    ("gpu", "preset", "ttft_ms", "alone_tokens_per_s", "full_per_s"),
    [
        ("l40", "static", 10.9, 274, 69),
        ("a100-80g", "static", 6.3, 642, 128),
        ("l40", "iss", 92, 229, 9.3),
        ("a100-80g", "iss", 54, 509, 16.7),
    ],
)
def test_the_roofline_is_what_was_computed_by_hand(
    gpu: str, preset: str, ttft_ms: float, alone_tokens_per_s: float, full_per_s: float
) -> None:
    """The table that was made before the code, from the sizes of the layers alone: 100 tokens of
    text, answers of 128 tokens, alone and 256 at once."""
    assumptions = EngineAssumptions(preset=preset, mfu=1, bandwidth_share=1, max_num_seqs=256)
    speed = find_speed(assumptions, GPUS[gpu])
    assert speed.prefill_s is not None
    assert 1000 * speed.prefill_s == pytest.approx(ttft_ms, rel=0.01)
    assert 128 * speed.rates[0] == pytest.approx(alone_tokens_per_s, rel=0.01)
    assert speed.requests_per_s == pytest.approx(full_per_s, rel=0.01)


def test_half_a_gpu_is_half_as_fast() -> None:
    whole, half = (
        find_speed(EngineAssumptions(gpus_per_replica=share), GPUS["h100"]) for share in (1, 0.5)
    )
    assert half.requests_per_s == pytest.approx(whole.requests_per_s / 2)


def test_a_captioning_job_is_arithmetic() -> None:
    """10 images a second on each GPU; 2 of 60 minutes for the start."""
    (plan,) = plan_captioning(CaptioningDemand(rows=3_480_000, hours=1, rate=10, gpu="h100"))
    assert plan.replicas == plan.gpus == 100
    assert plan.hours == pytest.approx(1.0)
    (plan,) = plan_captioning(CaptioningDemand(rows=3_480_000, gpus=50, rate=10, gpu="h100"))
    assert plan.hours == pytest.approx(58 / 30 + 2 / 60)
    assert plan.gpu_hours == pytest.approx(50 * plan.hours)
    # 2.7 ms to decode and 5.7 ms to resize each of 500 images a second
    assert plan.cores == pytest.approx(500 * 0.0084)


def test_two_engines_share_a_gpu() -> None:
    demand = CaptioningDemand(rows=10**6, gpus=4, rate=10, gpus_per_replica=0.5)
    assert plan_captioning(demand)[0].replicas == 8


def test_gpus_are_compared_by_what_they_cost() -> None:
    plans = plan_captioning(CaptioningDemand(rows=50_000_000, prices=PRICES))
    assert {plan.gpu for plan in plans} == {"a100-80g", "h100", "h200", "l40s"}
    costs = [plan.cost for plan in plans]
    assert costs == sorted(costs, key=float)
    for plan in plans:
        assert plan.price is not None
        assert plan.cost == pytest.approx(plan.price * plan.gpu_hours)
    (one,) = plan_captioning(CaptioningDemand(rows=50_000_000, prices=PRICES, gpu="h100"))
    assert one in plans


def serve(**values: Any) -> FleetPlan:
    (plan,) = plan_serving(ServingDemand(**{"gpu": "a100-80g"} | values))
    return plan


def test_one_replica_less_would_miss_the_target() -> None:
    plan = serve(requests_per_s=200, wait_ms=100, ttft_ms=100)
    assert plan.wait_ms is not None and plan.ttft_ms is not None
    assert plan.wait_ms <= 100 and plan.ttft_ms <= 100
    fewer = solve_queue(200, plan.speed, plan.replicas - 1)
    assert fewer is None or fewer.wait_s + (plan.speed.prefill_s or 0) > 0.1


def test_a_tighter_target_takes_more_replicas() -> None:
    plans = [serve(requests_per_s=200, wait_ms=wait_ms) for wait_ms in (1000, 100, 20)]
    assert plans[0].replicas <= plans[1].replicas < plans[2].replicas
    assert plans[0].utilization > plans[2].utilization


def test_a_steady_day_needs_a_fixed_number() -> None:
    """The trace has the same hour all day: as many replicas as keep half of the slots in use."""
    speed = find_speed(EngineAssumptions(), GPUS["a100-80g"])
    each = speed.rates[31]  # with 32 of 64 slots in use
    day = forecast_day([19.5 * each] * 1440, speed, 1, 100)
    assert set(day.replicas) == {20}


def test_replicas_follow_the_trace() -> None:
    values = {"trace": str(DAY), "replicas": "2:40", "max_num_seqs": 32, "gpus_per_replica": 0.5}
    plan = serve(preset="iss", gpu="l40", wait_ms=4000, **values)
    assert plan.hours == 24
    assert 36 <= plan.replicas <= 40
    assert plan.gpus == plan.replicas / 2
    assert plan.fixed_gpu_hours is not None
    assert plan.gpu_hours < 0.8 * plan.fixed_gpu_hours
    with pytest.raises(ConfigError, match="allow more replicas than 2:30"):
        serve(preset="iss", gpu="l40", wait_ms=4000, **values | {"replicas": "2:30"})


def test_the_load_changes_evenly_between_the_hours() -> None:
    rates = rates_of_minutes([3600.0, 7200.0])
    assert len(rates) == 120
    assert sum(rates) * 60 == pytest.approx(3600 + 7200)
    assert rates[29] == pytest.approx(1, abs=0.01)
    assert rates[60] == pytest.approx(1.5, abs=0.01)
    assert rates[119] == pytest.approx(1.5, abs=0.01)  # half-way to the first hour of the next day


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "hour,requests\n0,100\n1,200.5\n"),
        ("a.csv", "1e2\n200.5\n"),
        ("a.yaml", "[100, 200.5]"),
    ],
)
def test_a_trace_is_a_table_or_a_list(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_trace(tmp_path / name) == [100, 200.5]


@pytest.mark.parametrize("text", ["", "hour,requests\n", "0\n0\n", "1\nx\n", "1\n-1\n", "1\ninf\n"])
def test_another_file_is_no_trace(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match="number of requests of each hour"):
        read_trace(tmp_path / "a.csv")


MEASURED = {
    "throughput": {
        "machine": {"device": "NVIDIA H100 80GB HBM3"},
        "contenders": [
            {
                "name": name,
                "width": width,
                "requests_per_s": rate,
                "tokens_per_s": 128 * rate,
                "ttft_ms": 20.0 * width,
                "tpot_ms": 5.0 + width / 8,
            }
            for name, width, rate in (
                ("flashvl", 1, 2.0),
                ("generate, alone", 1, 1.0),
                ("flashvl", 16, 20.0),
                ("flashvl", 64, 50.0),
            )
        ],
    },
    "serve": {
        "speeds": [
            {"name": "engine", "width": 1, "ttft_ms": 20.0},
            {"name": "service", "width": 16, "ttft_ms": 300.0},
            {"name": "service", "width": 1, "ttft_ms": 30.0},
        ],
        "overload": {"capacity_per_s": 40.0},
    },
    "caption": {"job": 45.0, "engine": 60.0},
}


@pytest.mark.parametrize(
    ("name", "rate", "prefill_s"),
    [("throughput", 50.0, 0.02), ("serve", 40.0, 0.03), ("caption", 45.0, None)],
)
def test_measured_rates_take_the_place_of_peaks(
    name: str, rate: float, prefill_s: float | None, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps(MEASURED[name]))
    speed = find_speed(EngineAssumptions(measured=str(file)), GPUS["h100"])
    assert (speed.requests_per_s, speed.prefill_s, speed.num_slots) == (rate, prefill_s, 64)
    if name == "throughput":
        assert speed.rates[0] == 2.0 and speed.rates[15] == 20.0
        assert speed.rates[39] == pytest.approx(35.0)  # half-way between 16 and 64
        few = find_speed(EngineAssumptions(measured=str(file), max_num_seqs=16), GPUS["h100"])
        assert few.requests_per_s == 20.0


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["serve"], "either requests_per_s or trace"),
        (["serve", "--requests-per-s", "5", "--ttft-ms", "1"], "of a request alone"),
        (["serve", "--requests-per-s", "5", "--ttft-ms", "9", "--rate", "5"], "--measured"),
        (["serve", "--requests-per-s", "5", "--wait-ms", "0.1"], "do not meet wait_ms"),
        (["serve", "--trace", "/no/day.csv"], "cannot read /no/day.csv"),
        (["caption", "5", "--gpu", "a99"], "unknown GPU 'a99'"),
        (["caption", "5", "--preset", "vast"], "vast"),
        (["caption", "5", "--hours", "0.01"], "2 minutes"),
        (["caption", "5", "--prices", "/no/prices.yaml"], "cannot read /no/prices.yaml"),
        (["caption", "5", "--prices", PRICES, "--gpu", "l40"], "the price table has no l40"),
        (["caption", "5", "--prices", PRICES, "--rate", "9"], "name it by --gpu"),
        (["caption", "5", "--measured", "/no/found.json"], "cannot read /no/found.json"),
        (["caption", "5", "--measured", PRICES], "it is not JSON"),
        (["caption", "5", "--measured", "x", "--rate", "9"], "give one of them"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: list[str], reason: str) -> None:
    assert reason in refused(*arguments)


def test_a_file_without_rates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"contenders": []}')
    assert "no rates of requests" in refused("caption", "5", "--measured", str(tmp_path / "a.json"))
    (tmp_path / "a.yaml").write_text("a100-80g: cheap")
    assert "one KIND: PRICE a line" in refused("caption", "5", "--prices", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("arguments", [["serve", "--requests-per-s", "100"], ["caption", "1000"]])
def test_a_plan_is_text_or_json(arguments: list[str]) -> None:
    text = CliRunner().invoke(app, ["plan", *arguments]).stdout
    assert "Assumed:" in text
    (plan,) = json.loads(CliRunner().invoke(app, ["plan", *arguments, "--json"]).stdout)
    assert f"{plan['speed']['requests_per_s']:.3g}" in text
    assert plan["speed"]["source"] in text


def test_what_is_assumed_is_told() -> None:
    demand = ServingDemand(requests_per_s=10, text_tokens=77, answer_tokens=99, mfu=0.31)
    told = describe_serving(plan_serving(demand), demand)
    for assumed in ("77 tokens", "99 tokens", "31% of 312 TFLOP/s", "500 ms", "64 slots"):
        assert assumed in told
    job = CaptioningDemand(rows=10**6, rate=5)
    assert "given by --rate" in describe_captioning(plan_captioning(job), job)
