"""The latency benchmark: its figures agree with each other and with arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashvl.bench.latency import measure_latency
from flashvl.bench.models import build_random
from flashvl.cli import app


@pytest.mark.parametrize("preset", ["tiny", "tiny-iss"])
def test_the_figures_fit_together(preset: str) -> None:
    machine, latencies = measure_latency(
        *build_random(preset, torch.float32), num_tokens=6, rounds=2
    )
    assert [each.name for each in latencies] == ["flashvl", "generate"]
    assert machine.gemm_tflops > 0
    assert machine.read_gb_per_s > 0
    for each in latencies:
        assert len(each.rounds) == 2
        assert all(0 < first < whole for first, whole in each.rounds)
        whole_s = sum(whole for _, whole in each.rounds) / 2  # of two, mean and median are one
        assert each.tokens_per_s == pytest.approx(6 / whole_s)
        first_s = sum(first for first, _ in each.rounds) / 2
        assert each.ttft_ms == pytest.approx(first_s * 1e3)
        assert each.tpot_ms == pytest.approx((whole_s - first_s) / 5 * 1e3)
        assert 0 < each.roofline_fraction < 1


def test_the_command_writes_json_for_machines(tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    command = ["bench", "latency", "--preset", "tiny", "--random-weights"]
    result = CliRunner().invoke(
        app, [*command, "--tokens", "4", "--rounds", "1", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["machine"]["gemm_tflops"] > 0
    for contender in written["contenders"]:
        assert contender["name"] in result.stdout
        assert {"ttft_ms", "tpot_ms", "tokens_per_s", "roofline_fraction"} <= set(contender)


def test_a_preset_without_random_weights_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "latency", "--preset", "static"])
    assert result.exit_code == 2
    assert "--random-weights" in result.stderr
