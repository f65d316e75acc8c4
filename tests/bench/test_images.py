"""The benchmark of image processing: its figures for both ways fit together."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashvl.bench.images import compare_image_processing
from flashvl.cli import app


def test_it_reports_a_rate_and_a_ratio_for_each() -> None:
    ours, theirs = compare_image_processing(rounds=3)
    assert theirs.relative == 1.0
    assert ours.images_per_s > 0
    # Medians of three rounds: the ratio of the rates lies near the median of the ratios.
    assert ours.images_per_s / theirs.images_per_s == pytest.approx(ours.relative, rel=1.0)


@pytest.mark.long
def test_the_command_prints_both_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "images", "--rounds", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    names = [contender["name"] for contender in json.loads(file.read_text())["contenders"]]
    assert names == ["flashvl", "transformers SiglipImageProcessorPil"]
    for name in names:
        assert name in result.stdout
