"""Gauges that are set again and again."""

from collections import Counter

import pytest

from flashvl.data import gauges
from flashvl.data.gauges import LastingGauge
from tests.support.cluster import wait_until

Key = tuple[str, float, str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> "Counter[Key]":
    """How often each value of each gauge was set, in place of Ray's gauges."""
    told: Counter[Key] = Counter()

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            self.name = name

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            told[(self.name, value, (tags or {}).get("stage", ""))] += 1

    monkeypatch.setattr(gauges, "Gauge", Recorder)
    monkeypatch.setattr(gauges, "REPEAT_S", 0.01)
    return told


def test_the_last_value_of_each_tag_is_repeated_while_the_gauge_lives(
    said: "Counter[Key]",
) -> None:
    kept = LastingGauge("kept", "Kept.", ("stage",))
    dropped = LastingGauge("dropped", "Dropped.")
    kept.set(1.0, {"stage": "a"})
    kept.set(2.0, {"stage": "b"})
    kept.set(3.0, {"stage": "b"})
    dropped.set(4.0)
    del dropped
    wait_until(lambda: said[("kept", 1.0, "a")] > 2 and said[("kept", 3.0, "b")] > 2, 20)
    assert said[("kept", 2.0, "b")] == said[("dropped", 4.0, "")] == 1
