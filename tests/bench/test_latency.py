"""The latency benchmark: its figures agree with each other and with arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from flashvl.bench.contenders import _ATTENTION, build_flashvl, make_photo
from flashvl.bench.figures import plot_latencies
from flashvl.bench.latency import measure_latency
from flashvl.bench.machine import Machine
from flashvl.bench.models import RandomWeights, Twins, build_twins
from flashvl.cli import app

MACHINE = Machine(device="cpu", threads=2, dtype="float32", gemm_tflops=1.0, read_gb_per_s=10.0)


def random_twins(preset: str) -> Twins:
    return build_twins(preset, RandomWeights(torch.float32))


@pytest.mark.parametrize("preset", ["tiny", "tiny-iss"])
def test_the_figures_fit_together(preset: str, tmp_path: Path) -> None:
    contenders = build_flashvl(random_twins(preset))
    latencies = measure_latency(contenders, MACHINE, num_tokens=6, rounds=2)
    assert [each.name for each in latencies] == ["flashvl", "flashvl (generate)"]
    ours, theirs = latencies
    assert ours.prompt_tokens == theirs.prompt_tokens
    for each in latencies:
        assert len(each.rounds) == 2
        assert all(len(one.gaps_s) == 5 for one in each.rounds)
        # With two rounds, the mean is the median.
        answer_s = sum(one.first_s + sum(one.gaps_s) for one in each.rounds) / 2
        prepare_s = sum(one.prepare_s for one in each.rounds) / 2
        assert each.tokens_per_s == pytest.approx(6 / answer_s)
        assert each.tokens_per_s_from_jpeg == pytest.approx(6 / (answer_s + prepare_s))
        assert each.tokens_per_s_from_jpeg < each.tokens_per_s
        first_s = sum(one.first_s for one in each.rounds) / 2
        assert each.ttft_ms == each.ttft_mean_ms == pytest.approx(first_s * 1e3)
        assert each.ttft_from_jpeg_ms == pytest.approx((first_s + prepare_s) * 1e3)
        assert each.tpot_ms == pytest.approx((answer_s - first_s) / 5 * 1e3)
        assert each.tpot_mean_ms <= each.tpot_p99_ms
        # The same time, cut in two by the two limits.
        best_s = each.prefill_fraction * first_s + 5 * each.decode_fraction * each.tpot_ms / 1e3
        assert each.roofline_fraction == pytest.approx(best_s / answer_s)

    plot_latencies(latencies, MACHINE, tmp_path / "bars.png", scores={"flashvl": 62.4})
    assert Image.open(tmp_path / "bars.png").width > 2000


def test_the_work_is_what_the_layers_sizes_say() -> None:
    """By arithmetic: 2 operations a weight and token, 4 a pair of tokens and channel."""
    twins = random_twins("tiny")
    _, plain = build_flashvl(twins)
    work = plain.count_work(make_photo(0))
    vision, text = twins.twin.config.vision_config, twins.twin.config.text_config
    width, patches, depth = vision.hidden_size, 64, vision.num_hidden_layers
    tower = depth * patches * (
        2 * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * patches * width
    ) + patches * 2 * width * (3 * 12**2)
    adapter = 16 * 2 * (4 * width * 512 + 512**2 + 512 * text.hidden_size)
    hidden, prompt = text.hidden_size, work.prompt_tokens
    keys = hidden * text.num_key_value_heads // text.num_attention_heads
    layer = 2 * hidden**2 + 2 * hidden * keys + 3 * hidden * text.intermediate_size
    layers = text.num_hidden_layers
    prefill = layers * (2 * prompt * layer + 4 * prompt**2 * hidden)
    head = hidden * text.vocab_size
    assert work.prefill_flops == pytest.approx(tower + adapter + prefill + 2 * head, rel=1e-3)
    assert work.weight_bytes == 4 * (layers * layer + head)
    assert work.cache_bytes_per_token == 4 * layers * 2 * keys
    assert work.step_bytes(100) == pytest.approx(
        work.weight_bytes + (prompt + 50) * work.cache_bytes_per_token
    )


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_attention_on_a_gpu_counts_for_every_query_head(kind: str) -> None:
    """Two key heads serve twelve; without a GPU's memory the operators compute shapes alone."""
    query = torch.empty(1, 12, 30, 64, device="meta", dtype=torch.bfloat16)
    keys = torch.empty(1, 2, 50, 64, device="meta", dtype=torch.bfloat16)
    attend = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")
    options = {"flash": (), "efficient": (None, False), "cudnn": (None, False)}[kind]
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        attend(query, keys, keys, *options)
    assert counter.get_total_flops() == 4 * 12 * 30 * 50 * 64


def test_models_of_random_weights_share_their_memory() -> None:
    twins = random_twins("tiny")
    first, second = twins.model.state_dict(), twins.twin.state_dict()
    shared = [name for name in first if first[name].dim() > 1]
    assert shared
    for name in shared:
        assert first[name].data_ptr() == second[name].data_ptr()
        assert first[name].std() == pytest.approx(0.02, rel=0.1)
    assert twins.model.lm_head.weight is twins.model.get_input_embeddings().weight


@pytest.mark.long
def test_the_command_writes_json_and_png(tmp_path: Path) -> None:
    file, plot = tmp_path / "latency.json", tmp_path / "latency.png"
    command = ["bench", "latency", "--preset", "tiny", "--random-weights", "--plot", str(plot)]
    result = CliRunner().invoke(
        app, [*command, "--tokens", "4", "--rounds", "1", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["machine"]["gemm_tflops"] > 0
    assert written["machine"]["read_gb_per_s"] > 0
    for contender in written["contenders"]:
        assert contender["name"] in result.stdout
        assert {"ttft_ms", "tpot_ms", "tokens_per_s", "roofline_fraction"} <= set(contender)
        assert 0 < contender["roofline_fraction"] < 1
    assert Image.open(plot).format == "PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "static"], "--random-weights"),
        (["--plot", "nowhere/picture.png"], "a folder that exists"),
        (["--plot", "picture.jpg"], ".png"),
        (["--json", "nowhere/figures.json"], "cannot be written"),
        (["--preset", "stattic", "--random-weights"], "unknown preset 'stattic'"),
    ],
    ids=" ".join,
)
def test_a_bad_option_is_refused_before_anything_is_measured(
    options: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["bench", "latency", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
