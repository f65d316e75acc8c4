"""What a captioning job tells Prometheus."""

from typing import Any

import pyarrow as pa
import pytest

from flashvl.batch import metrics
from flashvl.batch.captioner import CAPTIONED
from flashvl.batch.metrics import EngineMetrics, JobMetrics

Said = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """What is told, in place of Ray's metrics, which need a node that collects them."""
    told: Said = []

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()):
            self.name, self.tag_keys = name, tag_keys

        def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert value > 0  # Ray refuses others
            self.set(value, tags)

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert set(tags or {}) == set(self.tag_keys)
            told.append((self.name, value, tags or {}))

    for name in ("Counter", "Gauge", "LastingGauge"):
        monkeypatch.setattr(metrics, name, Recorder)
    return told


def rows(*kinds: dict[str, Any]) -> pa.Table:
    keys = [{"id": str(row), "row": row} | kind for row, kind in enumerate(kinds)]
    return pa.Table.from_pylist(keys, CAPTIONED)


def test_rows_are_counted_by_what_became_of_them(said: Said) -> None:
    captioned = {"caption": "A dog.", "completion_tokens": 4}
    broken = {"step": "decode", "error": "DataError", "reason": "cannot identify image"}
    unread = {"step": "read", "error": "DataError", "reason": "no such file"}
    JobMetrics("out", 100).count(rows(captioned, broken, captioned, unread, broken))
    assert sorted(said, key=str) == sorted(
        [
            ("flashvl_caption_rows_total", 5, {}),
            ("flashvl_caption_tokens_total", 8, {}),
            ("flashvl_caption_dead_letters_total", 2, {"step": "decode", "error": "DataError"}),
            ("flashvl_caption_dead_letters_total", 1, {"step": "read", "error": "DataError"}),
            ("flashvl_caption_rows_left", 100, {"output": "out"}),
            ("flashvl_caption_rows_left", 95, {"output": "out"}),
        ],
        key=str,
    )


def test_an_empty_block_counts_nothing(said: Said) -> None:
    JobMetrics("out", 100).count(rows())
    assert said == [("flashvl_caption_rows_left", 100, {"output": "out"})] * 2


def test_an_engine_is_idle_while_it_has_no_block(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells so while it waits, and not only when it gets a block again."""
    now_s = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now_s)
    engine = EngineMetrics()
    now_s = 103.0
    engine.begin()
    now_s = 104.0
    engine.begin()
    engine.end(0.5)
    engine.report()
    now_s = 110.0
    engine.end(None)
    now_s = 112.0
    engine.report()
    now_s = 113.0
    engine.begin()
    idle = [value for name, value, _ in said if name.endswith("idle_seconds_total")]
    assert idle == [3.0, 2.0, 1.0]
    occupancy = [value for name, value, _ in said if name.endswith("occupancy_ratio")]
    assert occupancy == [0.5, 0.0]


def test_an_engine_of_a_service_tells_no_occupancy(said: Said) -> None:
    engine = EngineMetrics()
    engine.begin()
    engine.end(None)
    engine.report()
    assert not any(name.endswith("occupancy_ratio") for name, _, _ in said)
