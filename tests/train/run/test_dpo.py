"""Real stages of preferences on Ray Train and DeepSpeed: split, killed, resumed and merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from flashvl.data import synthetic
from flashvl.data.features import (
    ask_about_image,
    encode_conversation,
    make_tiles,
    normalize_tiles,
)
from flashvl.data.images import decode_image
from flashvl.data.schema import PREFERENCES
from flashvl.engine import Engine, Request
from flashvl.model.loading import load_model, load_processor
from flashvl.progress import ignore_progress
from flashvl.train.recipe import RECIPES
from flashvl.train.run.export import read_log
from flashvl.train.run.launch import run
from flashvl.train.run.stage import StageResult
from tests.train.run.test_resume import kill_worker

NUM_STEPS, GLOBAL_BATCH, NUM_HELD_OUT = 20, 4, 6
BETA = 0.2


def pair(row: int) -> dict[str, Any]:
    """A pair with two images, one, or a scene in words."""
    drawn = [synthetic.sample("train", 5, 2 * row + n, ("caption",)) for n in range(2)]
    shown = drawn[: row % 3]
    opening = "<image>\n" * len(shown) or drawn[0].scene.describe() + "\n"
    right, wrong = (sample.turns[0].answer for sample in drawn)
    return {
        "row": row,
        "images": [synthetic.encode_jpeg(sample.image(), 90) for sample in shown],
        "prompt": [{"role": "user", "content": opening + drawn[0].turns[0].question}],
        "chosen": [{"role": "assistant", "content": right}],
        "rejected": [{"role": "assistant", "content": wrong + " and more"}],
    }


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [pair(row) for row in range(NUM_STEPS * GLOBAL_BATCH + NUM_HELD_OUT)]
    parts = {"train": rows[NUM_HELD_OUT:], "held_out": rows[:NUM_HELD_OUT]}
    for name, part in parts.items():
        pq.write_table(pa.Table.from_pylist(part, PREFERENCES), folder / name, row_group_size=16)
    return {name: folder / name for name in parts}


Stage = Callable[..., StageResult]


@pytest.fixture(scope="module")
def stage(ray_cluster: None, tiny_iss_random: Path, tables: dict[str, Path]) -> Stage:
    """Run twenty steps; keyword arguments replace the recipe's keys."""

    def run_stage(
        output: Path, on_progress: Callable[..., None] = ignore_progress, **changes: object
    ) -> StageResult:
        recipe = {
            "kind": "dpo",
            "stage": "test",
            "init_from": str(tiny_iss_random),
            "output_dir": output,
            "data": {"parquet": str(tables["train"])},
            "eval_data": {"parquet": str(tables["held_out"])},
            "beta": BETA,
            "lora": {"r": 4, "alpha": 8},
            "global_batch_size": GLOBAL_BATCH,
            "token_budget": 700,
            "max_length": 700,
            "num_workers": 2,
            "use_gpu": False,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "save_steps": 4,
        }
        return run(RECIPES["dpo"].model_validate(recipe | changes), on_progress)

    return run_stage


@pytest.fixture(scope="module")
def truth(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    """One worker without ZeRO, which accumulates what two workers share."""
    return stage(tmp_path_factory.mktemp("truth"), num_workers=1, zero_stage=0)


def losses(result: StageResult) -> list[float]:
    return [record["loss"] for record in read_log(result.checkpoint)]


def score(folder: Path, row: dict[str, Any], answer: str) -> float:
    """Log-probability of an answer by transformers, in a row of its own."""
    processor, model = load_processor(folder), load_model(folder)
    images = [decode_image(data) for data in row["images"]]
    tiles = make_tiles(images, processor)
    input_ids, labels = encode_conversation(
        [*row["prompt"], *row[answer]], tiles.counts, processor, 10**4
    )
    pixels = {}
    if images:
        pixels = {"pixel_values": normalize_tiles(torch.from_numpy(tiles.pixels), processor)}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([input_ids]), **pixels).logits[0]
    targets = torch.tensor(labels[1:])
    return -float(F.cross_entropy(logits[:-1], targets, reduction="sum"))


def held_out_margins(start: Path, trained: Path) -> torch.Tensor:
    """By the definition of DPO, with the models in two folders."""
    margins = []
    for row in map(pair, range(NUM_HELD_OUT)):
        rewards = [
            BETA * (score(trained, row, answer) - score(start, row, answer))
            for answer in ("chosen", "rejected")
        ]
        margins.append(rewards[0] - rewards[1])
    return torch.tensor(margins)


@pytest.mark.long
def test_the_folder_is_the_trained_policy_merged(
    truth: StageResult, tiny_iss_random: Path, tables: dict[str, Path]
) -> None:
    """Held-out loss and figures of the last step follow from the folder that was written."""
    folder = Path(truth.checkpoint)
    assert truth.num_steps == NUM_STEPS and truth.num_trained == NUM_STEPS * GLOBAL_BATCH
    margins = held_out_margins(tiny_iss_random, folder)
    last = read_log(folder)[-1]
    assert truth.eval_loss == pytest.approx(float(-F.logsigmoid(margins).mean()), abs=1e-5)
    assert last["eval_loss"] == truth.eval_loss
    assert last["eval_margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert last["eval_accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert losses(truth)[0] == pytest.approx(0.693147, abs=1e-5)
    before, after = (load_model(each).state_dict() for each in (tiny_iss_random, folder))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[1] for name in changed} == {"multi_modal_projector", "language_model"}
    assert before.keys() == after.keys()


@pytest.mark.long
def test_the_engine_answers_like_the_merged_model(truth: StageResult) -> None:
    folder = Path(truth.checkpoint)
    model, processor = load_model(folder), load_processor(folder)
    image = synthetic.sample("heldout", 1, 3).image()
    request = Request(
        messages=ask_about_image("Describe the image."),
        images=[image],
        max_new_tokens=8,
    )
    (found,) = Engine(model, processor).generate([request])
    inputs = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image},
                    {"type": "text", "text": "Describe the image."},
                ],
            }
        ],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    assert found.token_ids == expected[: len(found.token_ids)]
    assert len(found.token_ids) > 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_workers_of_which_one_is_killed_make_the_same_steps(
    stage: Stage, truth: StageResult, tmp_path: Path, zero_stage: int
) -> None:
    """Pairs with two images, one or none, uneven between the workers; killed by -9, and resumed."""
    events = [kill_worker]

    def kill_once(done: int, total: int, note: str = "") -> None:
        if events and done >= 6:
            events.pop()()

    result = stage(tmp_path / "run", kill_once, zero_stage=zero_stage)
    assert not events
    assert result.num_steps == NUM_STEPS and result.num_trained == NUM_STEPS * GLOBAL_BATCH
    assert losses(result) == pytest.approx(losses(truth), abs=1e-5)
    assert result.eval_loss == pytest.approx(truth.eval_loss, abs=1e-5)
    expected = load_model(truth.checkpoint).state_dict()
    for name, weight in load_model(result.checkpoint).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_whole_weights_are_judged_by_a_copy_of_those_they_began_with(
    stage: Stage, tmp_path: Path, tiny_iss_random: Path, zero_stage: int
) -> None:
    """The copy stays what it was, also in a run that is resumed."""
    changes: dict[str, Any] = {"lora": None, "learning_rate": 1e-4, "zero_stage": zero_stage}
    events = [kill_worker]

    def kill_once(done: int, total: int, note: str = "") -> None:
        if events and done >= 6:
            events.pop()()

    result = stage(tmp_path / "run", kill_once, **changes)
    assert not events
    margins = held_out_margins(tiny_iss_random, Path(result.checkpoint))
    assert result.eval_loss == pytest.approx(float(-F.logsigmoid(margins).mean()), abs=1e-5)
