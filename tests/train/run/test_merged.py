"""What preference and reasoning tuning write is a plain model, wherever it is loaded."""

from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForImageTextToText

from flashvl.model.loading import load_model
from flashvl.train.recipe import RECIPES
from flashvl.train.run.launch import run
from tests.support.elsewhere import (
    MAX_TOKENS,
    VLLM,
    Conversation,
    answers_of,
    answers_of_the_engine,
    make_conversations,
)
from tests.support.images import data_url
from tests.support.serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COMMON = {
    "use_gpu": False,
    "precision": "fp32",
    "max_length": 900,
    "warmup_steps": 0,
    "lora": {"r": 4, "alpha": 8},
    "trainable": ["multi_modal_projector", "language_model"],
}


@pytest.fixture(scope="module")
def tuned(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny-iss` after a few steps of DPO on two workers, and then of GRPO, by adapters."""
    home = tmp_path_factory.mktemp("tuned")
    preferred = COMMON | {
        "kind": "dpo",
        "stage": "dpo",
        "init_from": "tiny-iss",
        "output_dir": str(home / "dpo"),
        "data": {"synthetic": {"count": 64, "seed": 3}},
        "global_batch_size": 16,
        "num_workers": 2,
        "learning_rate": 2e-3,
    }
    reinforced = COMMON | {
        "kind": "grpo",
        "stage": "grpo",
        "init_from": str(home / "dpo"),
        "output_dir": str(home / "grpo"),
        "data": {"synthetic": {"count": 8, "seed": 4, "tasks": ["count"]}},
        "global_batch_size": 4,
        "num_generations": 6,
        "max_completion_length": 16,
        "rewards": {"exact_match": 1.0},
        "num_workers": 1,
        "learning_rate": 2e-3,
    }
    for recipe in (preferred, reinforced):
        run(RECIPES[recipe["kind"]].model_validate(recipe))
    return home / "grpo"


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    return make_conversations(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def answers(tuned: Path, conversations: list[Conversation]) -> list[str]:
    return answers_of_the_engine(tuned, conversations)


def test_both_tunings_changed_the_model_and_left_no_adapter(
    tuned: Path, conversations: list[Conversation], answers: list[str]
) -> None:
    models = [load_model(folder) for folder in ("tiny-iss", tuned.parent / "dpo", tuned)]
    weights = [dict(model.named_parameters()) for model in models]
    assert len({tuple(each) for each in weights}) == 1
    for before, after in zip(weights, weights[1:], strict=False):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert any("language_model" in name for name in changed)
        assert any("multi_modal_projector" in name for name in changed)
        assert not any("vision_tower" in name for name in changed)
    assert answers != answers_of_the_engine("tiny-iss", conversations)


def test_the_auto_classes_load_the_same_weights(tuned: Path) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(tuned, trust_remote_code=True)
    ours = load_model(tuned).state_dict()
    theirs = loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_vllm_answers_as_the_engine(
    tuned: Path,
    conversations: list[Conversation],
    answers: list[str],
    vllm_python: Path,
    tmp_path: Path,
) -> None:
    assert answers_of(vllm_python, VLLM, tuned, conversations, tmp_path) == answers


def test_the_service_answers_as_the_engine(
    tuned: Path, conversations: list[Conversation], answers: list[str]
) -> None:
    with serving(f"--model={tuned}", "--dtype=float32") as service:
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
        for messages, answer in zip(conversations, answers, strict=True):
            said = client.chat.completions.create(
                model=tuned.name,
                messages=[as_openai(message) for message in messages],
                max_tokens=MAX_TOKENS,
                temperature=0,
            )
            assert said.choices[0].message.content == answer


def as_openai(message: dict) -> dict:
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(Path(part["image"]).read_bytes())}}
        if part["type"] == "image"
        else part
        for part in message["content"]
    ]
    return message | {"content": parts}
