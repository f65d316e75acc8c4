"""DPO is that of TRL: the same loss and gradients, with images, of policy and reference."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import SiglipVisionModel
from trl import DPOConfig, DPOTrainer

from flashvl.data.features import IGNORE_INDEX
from flashvl.model.loading import load_model, load_processor
from flashvl.train.answers import Answers
from flashvl.train.packed import model_inputs
from flashvl.train.policy import log_probs_of
from flashvl.train.recipe import LoraSettings
from flashvl.train.run.schedule import freeze_all_but
from tests.support.pairs import (
    BETA,
    PARTS,
    SETTINGS,
    batches_of,
    build,
    move,
    rows,
    step,
    trained_of,
)

Folder = Callable[[str], Path]


def assert_same(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * largest)


@pytest.fixture(params=["tiny", "tiny-iss"])
def folder(request: pytest.FixtureRequest, random_folder: Folder) -> Path:
    return random_folder(request.param)


def trl_trainer(folder: Path, output: Path, lora: LoraSettings | None) -> DPOTrainer:
    model = load_model(folder)
    config = None
    if lora is not None:
        names = {name.partition(".lora_")[0] for name in trained_of(build(folder, lora).module)}
        config = LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, target_modules=[f"model.{name}" for name in names]
        )
    return DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(output),
            beta=BETA,
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows()),
        processing_class=load_processor(folder),
        peft_config=config,
    )


@pytest.mark.long
@pytest.mark.parametrize("lora", [SETTINGS, None], ids=["lora", "full"])
@pytest.mark.parametrize("is_moved", [False, True], ids=["first step", "later"])
def test_loss_and_gradients_are_those_of_trl(
    folder: Path, tmp_path: Path, lora: LoraSettings | None, is_moved: bool
) -> None:
    trainer = trl_trainer(folder, tmp_path, lora)
    objective = build(folder, lora)
    if lora is None:
        freeze_all_but(trainer.model, PARTS)
    theirs, ours = trained_of(trainer.model), trained_of(objective.module)
    assert theirs.keys() == ours.keys()
    if lora is not None:  # the random halves of the adapters differ between models
        with torch.no_grad():
            for name, weight in ours.items():
                weight.copy_(theirs[name])
    if is_moved:
        move(theirs), move(ours)
    inputs = trainer._prepare_inputs(trainer.data_collator(rows()))
    # TRL counts the line's end that the chat template puts after an answer, which is never sampled.
    mask = inputs["completion_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    mask[torch.arange(len(mask)), last] = 0
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    loss.backward()
    gradients = {name: weight.grad for name, weight in theirs.items()}
    found = step(objective, batches_of(folder, rows()))
    assert_same(found, (loss.item(), gradients))
    if not is_moved:
        assert loss.item() == pytest.approx(np.log(2), abs=1e-6)
    figures = {name: total / count for name, (total, count) in objective.take_figures().items()}
    logged = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    for ours_name, theirs_name in (
        ("margin", "rewards/margins"),
        ("reward_chosen", "rewards/chosen"),
        ("reward_rejected", "rewards/rejected"),
        ("log_prob_chosen", "logps/chosen"),
        ("log_prob_rejected", "logps/rejected"),
    ):
        assert figures[ours_name] == pytest.approx(logged[theirs_name], rel=1e-4, abs=1e-5)
    expected = logged["rewards/accuracies"] if is_moved else 0.5
    assert figures["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("num_workers", [2, 5])
def test_loss_and_gradients_do_not_depend_on_how_pairs_are_split(
    folder: Path, num_workers: int
) -> None:
    """Some pairs have two images or none, and some workers no pair at all."""
    objective = build(folder, SETTINGS)
    move(trained_of(objective.module))
    pairs = rows()
    pairs[1]["images"] = []
    pairs[2]["images"] = pairs[2]["images"] + pairs[3]["images"]
    whole = step(objective, batches_of(folder, pairs))
    split = batches_of(folder, pairs, num_workers)
    assert len(split) == num_workers
    assert_same(step(objective, split), whole)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tiles of each call of a tower."""
    found: list[int] = []
    forward = SiglipVisionModel.forward

    def counted(self: Any, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        found.append(len(pixel_values))
        return forward(self, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(SiglipVisionModel, "forward", counted)
    yield found


@pytest.mark.parametrize("lora", [SETTINGS, None], ids=["lora", "full"])
def test_the_tower_sees_each_picture_once_and_both_models_see_it(
    folder: Path, lora: LoraSettings | None, calls: list[int]
) -> None:
    objective = build(folder, lora)
    move(trained_of(objective.module))
    pairs = rows()
    scored = []
    for shift in (0, 1):
        images = [pair["images"] for pair in pairs[shift:] + pairs[:shift]]
        changed = [pair | {"images": each} for pair, each in zip(pairs, images, strict=True)]
        (batch,) = batches_of(folder, changed)
        calls.clear()
        tensors = objective.collate(batch)
        inputs = model_inputs(tensors, objective.processor)
        logits, reference = objective.module(targets=tensors["targets"], **inputs)
        assert calls == [len(batch.tiles)]
        scored.append((log_probs_of(logits, tensors["targets"]), reference))
    for before, after in zip(*scored, strict=True):
        assert (before - after).abs().max() > 1e-3
    policy, reference = scored[0]
    assert (policy - reference).abs().max() > 1e-3
    assert policy.requires_grad and not reference.requires_grad


def test_the_reference_is_the_model_that_it_began_as(folder: Path) -> None:
    """Its log-probabilities are those of a model that is loaded anew, whatever was trained."""
    pairs = rows()
    (batch,) = batches_of(folder, pairs)
    fresh = Answers(load_model(folder).train(), load_processor(folder))
    tensors = fresh.collate(batch)
    inputs = model_inputs(tensors, fresh.processor)
    with torch.no_grad():
        logits = fresh.module(**inputs).logits[0]
    truth = logits.log_softmax(-1).gather(1, tensors["targets"][:, None])[:, 0]
    for lora in (SETTINGS, None):
        objective = build(folder, lora)
        move(trained_of(objective.module))
        _, reference = objective.module(targets=tensors["targets"], **inputs)
        torch.testing.assert_close(reference, truth, rtol=1e-5, atol=1e-5)
        assert (batch.labels != IGNORE_INDEX).sum() == len(reference)
