"""Loss, divergence and advantages of a step equal those of TRL's own trainer."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import distributed
from trl import GRPOConfig, GRPOTrainer

from flashvl.data.images import decode_image
from flashvl.data.storage import locate
from flashvl.model.loading import load_model, load_processor
from flashvl.train.grpo import objective
from flashvl.train.grpo.objective import Groups
from flashvl.train.recipe import GrpoRecipe
from flashvl.train.run.lora import add_adapters
from flashvl.train.run.schedule import freeze_all_but
from flashvl.train.run.worker import prepare_parts
from tests.support import rewards
from tests.support.problems import completion, problems, read_share, write_problems

NUM_PROMPTS, NUM_GENERATIONS = 3, 6
BETA = 0.04
MAX_LENGTHS = {"tiny": 95, "tiny-iss": 160}
"""Tokens of a prompt, so few that its completions do not fit behind one copy of it."""


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_problems(tmp_path / "table", problems(NUM_PROMPTS))


def build_recipe(folder: Path, table: Path, **changes: Any) -> GrpoRecipe:
    recipe = {
        "kind": "grpo",
        "stage": "test",
        "init_from": str(folder),
        "output_dir": str(table.parent / "output"),
        "data": {"parquet": str(table)},
        "trainable": ["multi_modal_projector", "language_model"],
        "global_batch_size": NUM_PROMPTS,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": 10,
        "max_length": MAX_LENGTHS[folder.name.rstrip("0123456789")],
        "token_budget": MAX_LENGTHS[folder.name.rstrip("0123456789")] + 15,
        "rewards": {"tests.support.rewards.length": 1.0, "tests.support.rewards.parity": 0.5},
        "beta": BETA,
        "precision": "fp32",
        "use_gpu": False,
    }
    return GrpoRecipe.model_validate(recipe | changes)


def noise_like(weight: torch.Tensor, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return 0.05 * torch.randn(weight.shape, generator=generator)


def perturb(model: torch.nn.Module, strip: str = "") -> None:
    """Change what is trained, by noise that depends on the names of the weights alone.

    Adapters begin at random, so noise takes their place.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                kept = 0.0 if ".lora_" in name else 1.0
                weight.mul_(kept).add_(noise_like(weight, name.removeprefix(strip)))


@dataclass(kw_only=True)
class Step:
    """What a step computes before its update."""

    advantages: dict[tuple[int, ...], float]
    """By the tokens of the completion."""
    loss: float
    kl: float
    entropy: float
    gradients: dict[str, torch.Tensor]


def our_step(recipe: GrpoRecipe, monkeypatch: pytest.MonkeyPatch) -> Step:
    processor = load_processor(recipe.init_from)
    model = load_model(recipe.init_from).train()
    adapters = prepare_parts(model, recipe)
    Path(recipe.output_dir).mkdir()
    # TRL gives the image's placeholder a share of the probability, which the engine does not.
    monkeypatch.setattr(objective, "adjust_logits", lambda logits, _, t: logits.float() / t)
    groups = Groups(model, processor, recipe, adapters, locate(recipe.output_dir))
    perturb(model)
    monkeypatch.setattr(
        groups.sampler,
        "sample",
        lambda engine, prompts, step: [
            [completion(processor, each.row, number) for number in range(each.num_completions)]
            for each in prompts
        ],
    )
    batches = groups.prepare(groups.module, read_share(recipe))
    assert sum(len(each.lengths) for each in batches) > NUM_PROMPTS  # groups are split
    num_items = torch.tensor(float(sum(groups.count_items(each).sum() for each in batches)))
    assert num_items == NUM_PROMPTS * NUM_GENERATIONS
    loss, advantages = 0.0, {}
    for batch in batches:
        part, by_document = groups.loss(groups.module, groups.collate(batch), num_items)
        assert torch.allclose(part * num_items, by_document.sum(), atol=1e-6)
        part.backward()
        loss += float(part.detach())
        said = batch.input_ids[batch.labels >= 0]
        pieces = np.split(said, np.cumsum(batch.branches)[:-1])
        values = batch.advantages.tolist()
        advantages |= dict(zip((tuple(piece.tolist()) for piece in pieces), values, strict=True))
    figures = {name: total / count for name, (total, count) in groups.take_figures().items()}
    return Step(
        advantages=advantages,
        loss=loss,
        kl=figures["kl"],
        entropy=figures["entropy"],
        gradients=gradients_of(model),
    )


def gradients_of(model: torch.nn.Module, strip: str = "") -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(strip): weight.grad
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def trl_step(recipe: GrpoRecipe) -> Step:
    """The same step by `GRPOTrainer`, with the same weights, images, completions and rewards."""
    processor = load_processor(recipe.init_from)
    model = load_model(recipe.init_from)
    rows = problems(NUM_PROMPTS)
    said = [
        [completion(processor, row["row"], number).token_ids for number in range(NUM_GENERATIONS)]
        for row in rows
    ]

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[Any, None]:
            return [list(tokens) for group in said for tokens in group], None

    has_adapters = recipe.lora is not None
    peft_config = None
    if has_adapters:
        trained = copy.deepcopy(model)
        add_adapters(trained, recipe.lora, recipe.trainable)
        names = sorted(
            {
                name.partition(".lora_")[0]
                for name, _ in trained.named_parameters()
                if ".lora_" in name
            }
        )
        peft_config = LoraConfig(
            r=recipe.lora.r, lora_alpha=recipe.lora.alpha, target_modules=names
        )
    else:
        freeze_all_but(model, recipe.trainable)
    trainer = Trainer(
        model=model,
        processing_class=processor,
        reward_funcs=[rewards.length, rewards.parity],
        peft_config=peft_config,
        train_dataset=Dataset.from_list([as_example(row) for row in rows]),
        args=GRPOConfig(
            output_dir=recipe.output_dir,
            per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=recipe.max_completion_length,
            temperature=recipe.temperature,
            epsilon=recipe.epsilon,
            reward_weights=list(recipe.rewards.values()),
            beta=BETA if has_adapters else 0.0,  # it cannot find the class for a copy of its own
            loss_type="grpo",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
    )
    strip = ""
    if has_adapters:
        strip = "base_model.model."
    else:
        trainer.beta, trainer.ref_model = BETA, copy.deepcopy(model).eval()
    perturb(trainer.model, strip)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    examples = [as_example(row) for row in rows for _ in range(NUM_GENERATIONS)]
    inputs = trainer._generate_and_score_completions(examples)
    check_prompts(recipe, inputs)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    tokens = [tuple(each) for group in said for each in group]
    metrics = trainer._metrics["train"]
    return Step(
        advantages=dict(zip(tokens, inputs["advantages"].tolist(), strict=True)),
        loss=float(loss.detach()),
        kl=metrics["kl"][-1],
        entropy=metrics["entropy"][-1],
        gradients=gradients_of(trainer.model, strip),
    )


def as_example(row: dict[str, Any]) -> dict[str, Any]:
    text = row["prompt"][0]["content"].removeprefix("<image>\n")
    return {
        "prompt": [{"role": "user", "content": text}],
        "images": [decode_image(image) for image in row["images"]],
        "answer": row["answer"],
    }


def check_prompts(recipe: GrpoRecipe, inputs: dict[str, torch.Tensor]) -> None:
    """TRL shows the model the same prompts as the feed."""
    share = read_share(recipe)
    prompts = {each.row: each.input_ids.tolist() for each in objective.read_prompts(share)}
    shown = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    ]
    assert shown[::NUM_GENERATIONS] == [prompts[row] for row in range(NUM_PROMPTS)]
    assert inputs["pixel_values"].shape[0] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("preset", "lora"),
    [
        pytest.param("tiny", None, marks=pytest.mark.slow),
        ("tiny-iss", {"r": 4, "alpha": 8}),
        pytest.param("tiny", {"r": 4, "alpha": 8}, marks=pytest.mark.slow),
        pytest.param("tiny-iss", None, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_trl(
    preset: str,
    lora: dict[str, int] | None,
    random_folder: Callable[[str], Path],
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temperature = 1.0 if lora is None else 0.7
    recipe = build_recipe(random_folder(preset), table, lora=lora, temperature=temperature)
    ours, theirs = our_step(recipe, monkeypatch), trl_step(recipe)
    assert ours.advantages == pytest.approx(theirs.advantages, abs=1e-5)
    assert any(abs(value) > 0.1 for value in ours.advantages.values())
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    assert ours.kl == pytest.approx(theirs.kl, abs=1e-5)
    assert ours.kl > 1e-3
    assert ours.entropy == pytest.approx(theirs.entropy, abs=1e-4)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert torch.allclose(gradient, theirs.gradients[name], atol=1e-5), name
