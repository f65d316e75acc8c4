"""The throughput benchmark: all requests are answered in full, and its figures fit together."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashvl.bench.contenders import build_flashvl
from flashvl.bench.machine import Machine
from flashvl.bench.models import RandomWeights, build_twins
from flashvl.bench.throughput import MAX_TOKENS, measure_throughput, ragged_lengths
from flashvl.cli import app

MACHINE = Machine(device="cpu", threads=2, dtype="float32", gemm_tflops=1.0, read_gb_per_s=10.0)


def test_lengths_are_geometric_with_mean_64_and_end_at_256() -> None:
    lengths = ragged_lengths(20_000)
    # The mean of a geometric distribution of mean m that is cut at c: m (1 - (1 - 1/m)^c).
    assert statistics.mean(lengths) == pytest.approx(64 * (1 - (1 - 1 / 64) ** 256), rel=0.03)
    assert (min(lengths), max(lengths)) == (1, MAX_TOKENS)
    assert ragged_lengths(5) == ragged_lengths(20_000)[:5]


def test_the_figures_fit_together() -> None:
    engine, plain = build_flashvl(build_twins("tiny", RandomWeights(torch.float32)))
    lengths = [3, 9, 2, 12, 5, 1]
    found = measure_throughput(engine, plain, MACHINE, lengths, width=2, rounds=1)
    ours, batches, alone = found
    assert [each.width for each in found] == [2, 2, 1]
    assert engine.engine.is_idle
    assert batches.times_batches == alone.times_alone == 1
    assert ours.times_batches == pytest.approx(ours.tokens_per_s / batches.tokens_per_s)
    assert ours.times_alone == pytest.approx(ours.tokens_per_s / alone.tokens_per_s)
    assert ours.decode_times_alone == pytest.approx(
        ours.decode_tokens_per_s / alone.decode_tokens_per_s
    )
    for each in found:
        assert each.ttft_ms > 0
        assert 0 < each.roofline_fraction < 1
    assert ours.requests_per_s == pytest.approx(ours.tokens_per_s / statistics.mean(lengths))


@pytest.mark.long
def test_the_command_writes_json_for_machines(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    command = ["bench", "throughput", "--width", "1", "--width", "3", "--requests", "4"]
    result = CliRunner().invoke(
        app, [*command, "--tokens", "3", "--rounds", "1", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert [(each["name"], each["width"]) for each in written["contenders"]] == [
        ("flashvl", 1),
        ("generate, batches", 1),
        ("generate, alone", 1),
        ("flashvl", 3),
        ("generate, batches", 3),
        ("generate, alone", 1),
    ]
    assert written["machine"]["gemm_tflops"] > 0
    for each in written["contenders"]:
        assert {"ttft_ms", "tpot_ms", "tokens_per_s", "roofline_fraction"} <= set(each)
