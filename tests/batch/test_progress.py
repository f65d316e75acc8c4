"""The rates that a job reports, and the line that shows its progress."""

import re
from typing import Any

import pyarrow as pa
import pytest

from flashvl.batch.captioner import CAPTIONED
from flashvl.batch.progress import Meter
from flashvl.entrypoint import show_progress


def rows(count: int) -> pa.Table:
    answer = {"completion_tokens": 10, "occupancy": 0.5}
    return pa.Table.from_pylist([answer] * count, schema=CAPTIONED)


def test_rates_begin_with_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates leave out the start of the engines and the 20,000 rows of an earlier run."""
    now_s = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    meter = Meter("captions", num_left=1000)
    now_s += 30
    meter.add(rows(64))
    now = meter.read(num_dead=3)
    assert str(now) == "3 dead, engines 50% full"
    for _ in range(3):
        now_s += 2
        meter.add(rows(100))
    now = meter.read(num_dead=3)
    assert now.images_per_s == pytest.approx(50) and now.tokens_per_s == pytest.approx(500)
    assert str(now) == "50.0 images/s, 3 dead, engines 50% full, 500 tokens/s"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_a_line_is_as_wide_as_the_terminal_and_what_is_shown_is_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    parts = ["1234.5 images/s", "12 dead", "engines 97% full", "12345 tokens/s"]
    with show_progress("captioning") as on_progress:
        on_progress(25_948, 200_000, ", ".join(parts))
        on_progress(26_948, 200_000, ", ".join(parts))
    lines = [line for line in plain_lines(capsys.readouterr()) if "26948" in line]
    assert lines and all(len(line) <= width for line in lines)
    (line,) = {line.rstrip() for line in lines}
    num_shown = {40: 0, 60: 1, 80: 2, 100: 3, 120: 4, 200: 4}[width]
    note = re.escape(", ".join(parts[:num_shown]))
    assert re.fullmatch(rf"captioning \S+ +26948/200000 \S+ ?{note}", line), line


def plain_lines(captured: Any) -> list[str]:
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.err))
