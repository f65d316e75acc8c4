"""TRL's own trainers for DPO, GRPO and SFT work with Flash-VL's model and processor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from flashvl.data import synthetic
from flashvl.model.loading import load_model, load_processor

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}


pytestmark = pytest.mark.long


@pytest.fixture(params=["tiny_random", "tiny_iss_random"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["full", "lora"])
def lora(request: pytest.FixtureRequest) -> LoraConfig | None:
    if request.param == "full":
        return None
    return LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)")


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Questions about scenes of different sizes, which have different numbers of tiles."""
    drawn = list(synthetic.samples("train", 7, count))
    assert len({sample.size for sample in drawn}) > 1
    return [
        {
            "prompt": [{"role": "user", "content": sample.turns[0].question}],
            "images": [sample.image()],
            "answer": sample.turns[0].answer,
        }
        for sample in drawn
    ]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    after = dict(model.named_parameters())
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


def assert_learnt(trainer: Any, before: dict[str, torch.Tensor], lora: LoraConfig | None) -> None:
    """The step changed the weights that are trained, in every part, and no others."""
    assert trainer.state.global_step == 1
    names = changed(before, trainer.model)
    if lora is None:
        for part in ("vision_tower", "multi_modal_projector", "language_model"):
            assert any(part in name for name in names), part
    else:
        assert isinstance(trainer.model, PeftModel)
        assert names
        assert all("lora_" in name for name in names)


def test_dpo_takes_a_step(folder: Path, lora: LoraConfig | None, tmp_path: Path) -> None:
    data = [
        {
            "prompt": row["prompt"],
            "images": row["images"],
            "chosen": said(row["answer"]),
            "rejected": said("a small red cross"),
        }
        for row in rows()
    ]
    trainer = DPOTrainer(
        model=load_model(folder),
        args=DPOConfig(output_dir=str(tmp_path), beta=0.1, max_length=None, **COMMON),
        train_dataset=Dataset.from_list(data),
        processing_class=load_processor(folder),
        peft_config=lora,
    )
    before = weights(trainer.model)
    trainer.train()
    assert_learnt(trainer, before, lora)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    # Before the first step policy and reference are equal, so the loss is log-sigmoid of zero.
    assert losses == pytest.approx([0.6931], abs=1e-3)


def test_grpo_takes_a_step(folder: Path, lora: LoraConfig | None, tmp_path: Path) -> None:
    seen: list[str] = []

    def length_reward(completions: list[Any], **columns: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        seen.extend(texts)
        return [float(index % 2) for index, _ in enumerate(texts)]

    trainer = GRPOTrainer(
        model=load_model(folder),
        reward_funcs=length_reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            beta=1e-3,
            num_generations=2,
            max_completion_length=4,
            loss_type="grpo",
            **COMMON | {"per_device_train_batch_size": 4},
        ),
        train_dataset=Dataset.from_list(rows()),
        processing_class=load_processor(folder),
        peft_config=lora,
    )
    before = weights(trainer.model)
    trainer.train()
    assert len(seen) == 4
    assert_learnt(trainer, before, lora)


def test_sft_takes_a_step_with_two_one_and_no_images(folder: Path, tmp_path: Path) -> None:
    first, second, third, fourth = rows()
    data = [
        {"prompt": first["prompt"], "images": first["images"] + fourth["images"]},
        {"prompt": second["prompt"], "images": second["images"]},
        {"prompt": third["prompt"], "images": []},
    ]
    trainer = SFTTrainer(
        model=load_model(folder),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_length=None,
            **COMMON | {"per_device_train_batch_size": 3},
        ),
        train_dataset=Dataset.from_list([row | {"completion": said("3")} for row in data]),
        processing_class=load_processor(folder),
    )
    before = weights(trainer.model)
    trainer.train()
    assert_learnt(trainer, before, None)
