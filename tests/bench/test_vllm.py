"""vLLM itself as a contender, with tiny models; and options that are refused before it starts."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flashvl.bench.contenders import build_flashvl, make_photo
from flashvl.bench.machine import Machine
from flashvl.bench.models import RandomWeights, build_twins
from flashvl.bench.throughput import compare_at_once
from flashvl.bench.vllm import run_vllm
from flashvl.cli import app
from flashvl.errors import ConfigError

MACHINE = Machine(device="cpu", threads=2, dtype="float32", gemm_tflops=1.0, read_gb_per_s=10.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", ["tiny", "tiny-iss"])
def test_vllm_answers_in_turn_with_the_engine(preset: str, vllm_python: Path) -> None:
    twins = build_twins(preset, RandomWeights(torch.float32))
    engine, plain = build_flashvl(twins)
    jpegs = [make_photo(seed) for seed in range(3)]
    with run_vllm(vllm_python, plain, twins.processor, options=["--enforce-eager"]) as vllm:
        # The prompt is as long as ours, tiles and all, or this fails.
        assert vllm.count_work(jpegs[0]) == plain.count_work(jpegs[0])
        times = vllm.answer(vllm.prepare(jpegs[0]), 5)
        assert len(times) == 5 and times == sorted(times)

        prepared = [vllm.prepare(jpeg) for jpeg in jpegs]
        assert list(map(len, vllm.answer_all(prepared, [2, 7, 4]))) == [2, 7, 4]

        found = compare_at_once(engine, vllm, MACHINE, width=4, num_tokens=6, rounds=2)
        assert [each.name for each in found] == ["flashvl", "vLLM"]
        for each in found:
            assert each.width == 4
            assert each.tokens_per_s > 0 and each.decode_tokens_per_s > 0
            assert each.requests_per_s == pytest.approx(each.tokens_per_s / 6)

        vllm.process.kill()
        with pytest.raises(ConfigError, match="^vLLM ended: .*leave out --vllm$"):
            vllm.prepare(jpegs[0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_command_has_rows_of_vllm(vllm_python: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "peers.json", tmp_path / "peers.png"
    options = ["--preset", "tiny", "--only", "flashvl", "--vllm", str(vllm_python)]
    options += ["--tokens", "4", "--rounds", "1", "--json", str(file), "--plot", str(plot)]
    result = CliRunner().invoke(app, ["bench", "peers", *options])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert [each["name"] for each in written["contenders"]] == ["flashvl", "vLLM"]
    assert [(each["name"], each["width"]) for each in written["at_once"]] == [
        ("flashvl", 16),
        ("vLLM", 16),
    ]
    assert written["vllm"] in result.stdout
    assert sum(line.split()[:1] == ["16"] for line in result.stdout.splitlines()) == 2
    assert Image.open(plot).format == "PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vllm", "nowhere/python"], "nowhere/python cannot be run: No such file"),
        # This environment does not have vLLM.
        (["--vllm", sys.executable], "cannot import vLLM: ModuleNotFoundError"),
        (["--vllm", "/bin/false"], "cannot import vLLM"),
        (["--only", "LLaVA"], "--only 'LLaVA' is none of flashvl, "),
    ],
    ids=" ".join,
)
def test_a_bad_option_is_refused_before_anything_is_built(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "peers", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
