"""The benchmark of GRPO: both sides sample and train the same, and the figures are their times."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from trl.data_utils import prepare_multimodal_messages

from flashvl.bench.grpo import (
    NUM_GENERATIONS,
    GrpoSpeed,
    RolloutSpeed,
    StepSpeed,
    _add_adapters,
    _build_trainer,
    _process_group,
    draw_problems,
    measure_grpo,
)
from flashvl.bench.models import RandomWeights, build_random
from flashvl.bench.report import describe_grpo
from flashvl.data.features import ask_about_image, encode_prompt, make_tiles
from flashvl.model.loading import load_model, load_processor


def test_both_are_asked_the_same_and_train_the_same_layers(tmp_path: Path) -> None:
    model, processor = load_model("tiny"), load_processor("tiny")
    ours = load_model("tiny")
    names = _add_adapters(ours)
    problems = draw_problems(3, 2)
    with _process_group(str(tmp_path)):
        trainer = _build_trainer(model, processor, names, problems, 2, 8, str(tmp_path))
    prompts = [
        prepare_multimodal_messages([{"role": "user", "content": each.question}], [each.image])
        for each in problems
    ]
    trl_ids, _, _ = trainer._tokenize_prompts(prompts)
    for problem, ids in zip(problems, trl_ids, strict=True):
        tiles = make_tiles([problem.image], processor)
        assert ids == encode_prompt(ask_about_image(problem.question), tiles.counts, processor)
    trained = [
        {name.removeprefix("base_model.model."): weight.shape
         for name, weight in each.named_parameters() if ".lora_" in name}
        for each in (trainer.model, ours)
    ]  # fmt: skip
    assert trained[0] == trained[1] != {}


@pytest.mark.long
def test_rollouts_and_steps_are_timed() -> None:
    threads = torch.get_num_threads()
    try:
        found = measure_grpo(
            "tiny", None, False, num_layers=None, num_prompts=2, num_tokens=4, rounds=1
        )
    finally:
        torch.set_num_threads(threads)
    rollouts, step = found.rollouts, found.step
    assert step is not None
    assert rollouts.times_trl == pytest.approx(rollouts.flashvl / rollouts.trl)
    assert step.times_trl == pytest.approx(step.trl / step.flashvl)
    assert 0 < step.rollout + step.update < step.flashvl
    assert all(1 <= each <= 4 for each in (rollouts.trl_tokens, rollouts.flashvl_tokens))


def test_a_preset_can_have_few_layers_of_full_width() -> None:
    weights = RandomWeights(torch.float32)
    whole, _ = build_random("tiny", weights)
    few, _ = build_random("tiny", weights, 2)
    count = len(few.model.language_model.layers)
    assert (count, len(whole.model.language_model.layers)) == (2, 4)
    assert few.config.text_config.hidden_size == whole.config.text_config.hidden_size


def test_the_report() -> None:
    rollouts = RolloutSpeed(
        trl=20.0,
        flashvl=100.0,
        times_trl=5.0,
        prompt_tokens=41.5,
        trl_tokens=3.0,
        flashvl_tokens=3.1,
    )
    step = StepSpeed(trl=6.0, flashvl=1.5, rollout=0.5, update=0.9, times_trl=4.0)
    speed = GrpoSpeed(num_prompts=4, max_completion_length=64, rollouts=rollouts, step=step)
    lines = describe_grpo(speed, 3).splitlines()
    assert f"{NUM_GENERATIONS} completions each" in lines[0]
    assert "TRL 20.0" in lines[1] and lines[1].endswith("5.0x")
    assert "TRL 6.00 s" in lines[2] and lines[2].endswith("4.0x")
    assert set(asdict(speed)) == {"num_prompts", "max_completion_length", "rollouts", "step"}
    alone = GrpoSpeed(num_prompts=4, max_completion_length=64, rollouts=rollouts, step=None)
    assert describe_grpo(alone, 3).splitlines() == lines[:2]
