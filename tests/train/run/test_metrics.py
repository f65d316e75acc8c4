"""Figures of a step, put together from two ranks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from flashvl.train.run.metrics import Figures, Meter, gather, peak_flops
from tests.support.ranks import run_ranks


def check_gathered() -> None:
    rank = distributed.get_rank()
    own = Figures(
        loss=6.0 + rank,
        items=2.0,
        rows=3.0,
        tokens=60.0,
        capacity=100.0,
        flops=1e12 * (1 + rank),
        wait_s=0.5 * rank,
        dead=float(rank),
    )
    losses, items = (np.array(values, float) for values in ([6 + rank, 0.0], [2.0, 0.0]))
    figures = {"reward": (1.0, 1.0 + rank), "never": (0.0, 0.0)}
    totals = gather(own, losses, items, figures, torch.device("cpu"))
    assert totals.loss == pytest.approx(13 / 4)
    assert totals.means == {"reward": pytest.approx(2 / 3)}
    assert (totals.sums.rows, totals.sums.dead) == (6, 1)
    assert totals.longest_wait_s == 0.5
    assert totals.imbalance == pytest.approx(1 - 1.5 / 2)
    meter = Meter(sources=("a", "b"), peak_flops=1e15, seconds=10.0)
    record = meter.record(7, totals, [1e-3, 1e-4], 2.0)
    assert record["loss_by_source"] == {"a": pytest.approx(13 / 4)}
    assert record["padding_share"] == pytest.approx(0.4)
    assert record["seconds"] > 10
    assert record["learning_rates"] == [1e-3, 1e-4]
    step_s = record["seconds"] - 10
    assert record["mfu"] == pytest.approx(3e12 / step_s / 2 / 1e15)
    assert record["tflops"] == pytest.approx(3 / step_s / 2)
    assert record["tokens_per_s"] == pytest.approx(120 / step_s)


@pytest.mark.long
def test_two_ranks_make_one_record() -> None:
    run_ranks(check_gathered, 2)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA L40S", 362.05),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_device(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    device: Any = SimpleNamespace(type="cuda")
    expected = tflops * 1e12 if tflops is not None else None
    assert peak_flops(device) == expected
    assert peak_flops(torch.device("cpu")) is None
