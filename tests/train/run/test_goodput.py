"""Goodput, by arithmetic."""

import pytest

from flashvl.train.run import goodput
from flashvl.train.run.goodput import Goodput


def test_lost_steps_and_stops_count_as_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    now_s = 0.0
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(goodput.LastingGauge, "set", lambda _, value, tags: shown.append(value))
    measured = Goodput("stage1", seconds=500.0)  # of an earlier run
    now_s = 100.0
    measured.show(590.0)  # 10 s to start
    now_s = 200.0
    measured.show(540.0)  # workers were lost, and the last checkpoint is old
    now_s = 400.0
    measured.show(740.0)
    assert shown == [pytest.approx(0.9), pytest.approx(0.2), pytest.approx(0.6)]
