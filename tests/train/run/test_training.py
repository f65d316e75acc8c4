"""Real stages on Ray Train and DeepSpeed, compared with plain PyTorch and with each other."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from flashvl.data import synthetic
from flashvl.data.features import encode_conversation, make_tiles, normalize_tiles, pad
from flashvl.data.images import decode_image
from flashvl.data.ledger.lock import held
from flashvl.data.schema import CONVERSATIONS
from flashvl.data.storage import locate
from flashvl.errors import CheckpointError, ConfigError
from flashvl.model.loading import load_model, load_processor
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.train.recipe import RECIPES
from flashvl.train.run.export import read_log
from flashvl.train.run.launch import run
from flashvl.train.run.stage import StageResult
from tests.support.images import encode

STEPS, GLOBAL_BATCH = 5, 8
NUM_HELD_OUT = 6
PROJECTOR = "model.multi_modal_projector."

Stage = Callable[..., StageResult]


@pytest.fixture(scope="module")
def stage(ray_cluster: None, tiny_random: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Run a small stage 1; keyword arguments replace its recipe's keys."""

    def run_stage(
        kind: str = "supervised",
        on_progress: ShowProgress = ignore_progress,
        **changes: object,
    ) -> StageResult:
        recipe = {
            "kind": kind,
            "stage": "test",
            "init_from": str(tiny_random),
            "output_dir": tmp_path_factory.mktemp("stage"),
            "data": {"synthetic": {"count": STEPS * GLOBAL_BATCH, "seed": 5}},
            "trainable": ["multi_modal_projector"],
            "global_batch_size": GLOBAL_BATCH,
            "token_budget": 1000,
            "max_length": 1000,
            "num_workers": 1,
            "use_gpu": False,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "warmup_steps": 2,
            "save_steps": 2,
            "save_total_limit": 3,
        }
        return run(RECIPES[kind].model_validate(recipe | changes), on_progress)

    return run_stage


@pytest.fixture(scope="module")
def two_workers(stage: Stage) -> StageResult:
    """A stage on two workers without accumulation."""
    return stage(num_workers=2)


@pytest.fixture(scope="module")
def one_worker(stage: Stage) -> StageResult:
    """Accumulation 2 on one worker."""
    return stage(num_workers=1)


def losses(result: StageResult) -> list[float]:
    return [record["loss"] for record in read_log(result.checkpoint)]


def plain_pytorch_losses(folder: Path, model: nn.Module, trained: nn.Module) -> list[float]:
    """Losses of the same stage without Ray, DeepSpeed, the feed or an objective."""
    processor = load_processor(folder)
    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    result = []
    for step in range(STEPS):
        warmup = min(1.0, step / 2)
        cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, step - 2) / (STEPS - 2)))
        optimizer.param_groups[0]["lr"] = warmup * (0.1 + 0.9 * cosine) * 1e-3
        encoded, images = [], []
        for index in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH):
            row = synthetic.conversation(synthetic.sample("train", 5, index), index)
            encoded.append(encode_conversation(row["messages"], [1], processor, 2048))
            images.append(decode_image(row["images"][0]))
        input_ids = pad([ids for ids, _ in encoded], 0)
        logits = model(
            input_ids=input_ids,
            attention_mask=pad([[1] * len(ids) for ids, _ in encoded], 0),
            pixel_values=normalize_tiles(
                torch.from_numpy(make_tiles(images, processor).pixels), processor
            ),
        ).logits
        labels = pad([labels for _, labels in encoded], -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        result.append(loss.item())
    return result


def held_out_loss(folder: Path) -> float:
    """Mean loss of the held-out rows' answer tokens, one row after the other."""
    processor, model = load_processor(folder), load_model(folder)
    total, num_tokens = 0.0, 0
    for index in range(NUM_HELD_OUT):
        row = synthetic.conversation(synthetic.sample("train", 8, index), index)
        input_ids, labels = encode_conversation(row["messages"], [1], processor, 2048)
        tiles = make_tiles([decode_image(row["images"][0])], processor).pixels
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([list(input_ids)]),
                pixel_values=normalize_tiles(torch.from_numpy(tiles), processor),
            ).logits[0]
        wanted = torch.tensor(list(labels))[1:].long()
        total += float(F.cross_entropy(logits[:-1], wanted, reduction="sum"))
        num_tokens += int((wanted != -100).sum())
    return total / num_tokens


def test_losses_are_those_of_plain_pytorch(two_workers: StageResult, tiny_random: Path) -> None:
    model = load_model(tiny_random)
    truth = plain_pytorch_losses(tiny_random, model, model.model.multi_modal_projector)
    assert losses(two_workers) == pytest.approx(truth, abs=1e-4)


def test_two_workers_equal_one_that_accumulates_two(
    one_worker: StageResult, two_workers: StageResult
) -> None:
    assert losses(one_worker) == pytest.approx(losses(two_workers), abs=1e-4)
    assert one_worker.num_steps == STEPS


def test_a_resumed_stage_makes_the_same_steps(
    stage: Stage, two_workers: StageResult, tmp_path: Path
) -> None:
    """The same workers, the same seed, the same losses to the last bit, and the same weights."""
    output = tmp_path / "killed"
    shutil.copytree(two_workers.checkpoint, output)
    for name in ("config.json", "training_log.json"):
        (output / name).unlink()
    for step in (4, 5):
        shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    (output / "checkpoints" / "step-00000006").mkdir()  # begun, but never completed
    told: list[int] = []
    result = stage(on_progress=lambda done, *_: told.append(done), output_dir=output, num_workers=2)
    assert told
    assert losses(result) == losses(two_workers)
    assert (
        dataclasses.replace(result, checkpoint=two_workers.checkpoint, seconds=two_workers.seconds)
        == two_workers
    )
    resumed, truth = (load_model(each.checkpoint).state_dict() for each in (result, two_workers))
    assert all(torch.equal(weight, truth[name]) for name, weight in resumed.items())
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (2, 4, 5)]


def test_learning_rate_is_a_cosine_with_a_floor(two_workers: StageResult) -> None:
    rates = [record["learning_rate"] for record in read_log(two_workers.checkpoint)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / (STEPS - 2))) for step in range(STEPS - 2)]
    assert rates == pytest.approx([0.0, 5e-4, *(1e-4 + 9e-4 * share for share in cosine)])


def test_stage_1_changes_the_adapter_and_nothing_else(
    two_workers: StageResult, tiny_random: Path
) -> None:
    before = load_model(tiny_random).state_dict()
    after = load_model(two_workers.checkpoint).state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        same = torch.equal(weight, after[name])
        assert same != name.startswith(PROJECTOR), name


def test_a_checkpoint_is_a_hugging_face_folder_with_logs(two_workers: StageResult) -> None:
    folder = Path(two_workers.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        images=Image.new("RGB", (50, 40)), text="<|image_pad|>\nHow many?", return_tensors="pt"
    )
    reloaded = load_model(folder)
    assert torch.equal(model.eval()(**inputs).logits, reloaded(**inputs).logits)
    assert list((folder / "runs").glob("events.out.tfevents.*"))
    for record in read_log(folder):
        assert record["samples"] == GLOBAL_BATCH
        assert record["tokens_per_s"] > record["samples_per_s"] > 0
        for share in ("data_wait_share", "padding_share", "imbalance"):
            assert 0 <= record[share] < 1


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet table of sixteen good rows and three bad ones."""
    rows = [
        synthetic.conversation(synthetic.sample("train", 9, index), index) for index in range(16)
    ]
    black = encode(Image.new("RGB", (20, 20)))
    question = {"role": "user", "content": "<image>\nWhat is this?"}
    answer = {"role": "assistant", "content": "5 shapes"}
    rows.insert(3, {"row": 16, "images": [b"no image"], "messages": [question, answer]})
    rows.insert(7, {"row": 17, "images": [black], "messages": [question]})
    long = {"role": "assistant", "content": "5 shapes" * 500}
    rows.append({"row": 18, "images": [black], "messages": [question, long]})
    folder = tmp_path_factory.mktemp("conversations")
    pq.write_table(pa.Table.from_pylist(rows, schema=CONVERSATIONS), folder / "part.parquet")
    return folder


def test_stage_2_from_a_table_changes_every_part_and_leaves_bad_rows_out(
    stage: Stage, two_workers: StageResult, conversations: Path
) -> None:
    result = stage(
        init_from=str(two_workers.checkpoint),
        data={"parquet": str(conversations)},
        eval_data={"synthetic": {"count": NUM_HELD_OUT, "seed": 8}},
        trainable=["vision_tower", "multi_modal_projector", "language_model"],
        max_length=500,
        zero_stage=2,
        num_workers=2,
        warmup_steps=0,
    )
    assert result.num_steps == math.ceil(19 / GLOBAL_BATCH)  # three rows leave holes
    assert (result.num_trained, result.num_dead) == (16, 3)
    dead = pq.read_table(Path(result.checkpoint) / "dead_letters").to_pylist()
    assert sorted(row["row"] for row in dead) == [3, 7, 18]
    assert all(row["step"] and row["reason"] for row in dead)
    assert result.eval_loss == pytest.approx(held_out_loss(Path(result.checkpoint)), abs=1e-4)
    before = load_model(two_workers.checkpoint).state_dict()
    after = load_model(result.checkpoint).state_dict()
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        names = [name for name in before if name.startswith(f"model.{part}.")]
        changed = [name for name in names if not torch.equal(before[name], after[name])]
        assert len(changed) >= 0.9 * len(names), part


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows with images and four without, in turn: of two workers one never sees an image."""
    drawn = [synthetic.sample("train", 9, index) for index in range(32)]
    rows = [
        synthetic.conversation(sample, index, words_share=float(index // 4 % 2))
        for index, sample in enumerate(drawn)
    ]
    assert [bool(row["images"]) for row in rows] == ([True] * 4 + [False] * 4) * 4
    folder = tmp_path_factory.mktemp("mixed")
    pq.write_table(pa.Table.from_pylist(rows, schema=CONVERSATIONS), folder / "part.parquet")
    return folder


@pytest.mark.slow
def test_a_worker_that_sees_only_text_keeps_step_with_one_that_sees_images(
    stage: Stage, mixed: Path, tiny_iss_random: Path
) -> None:
    """ZeRO-1, 2 and 3 on two ranks, of which one may see only text, equal one rank without ZeRO."""
    results = [
        stage(
            init_from=str(tiny_iss_random),
            data={"parquet": str(mixed)},
            eval_data={"parquet": str(mixed)},
            eval_steps=2,
            trainable=["vision_tower", "multi_modal_projector", "language_model"],
            zero_stage=zero_stage,
            num_workers=num_workers,
            warmup_steps=0,
        )
        for zero_stage, num_workers in ((0, 1), (1, 2), (2, 2), (3, 2))
    ]
    assert results[0].num_steps == 4
    truth, *others = (load_model(result.checkpoint).state_dict() for result in results)
    before = load_model(tiny_iss_random).state_dict()
    assert any(
        not torch.equal(weight, before[name])
        for name, weight in truth.items()
        if "vision_tower" in name
    )
    for result, weights in zip(results[1:], others, strict=True):
        assert losses(result) == pytest.approx(losses(results[0]), abs=1e-5)
        assert result.eval_loss == pytest.approx(results[0].eval_loss, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, truth[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_low_rank_adapters_are_those_of_peft_and_merged(
    stage: Stage, tiny_random: Path, zero_stage: int
) -> None:
    result = stage(
        trainable=["language_model"],
        lora={"r": 4, "alpha": 8},
        zero_stage=zero_stage,
        num_workers=2,
    )
    torch.manual_seed(0)
    model = load_model(tiny_random)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers = r".*language_model\.layers\..*_proj"
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers))
    assert losses(result) == pytest.approx(plain_pytorch_losses(tiny_random, peft, peft), abs=1e-4)
    truth = peft.merge_and_unload().state_dict()
    found = load_model(result.checkpoint).state_dict()
    assert found.keys() == truth.keys() == before.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, truth[name], rtol=1e-4, atol=1e-5)
        is_linear = "language_model.layers" in name and weight.dim() == 2
        assert torch.equal(weight, before[name]) != is_linear, name


@pytest.mark.slow
def test_the_tower_learns_what_lies_in_the_cells(stage: Stage) -> None:
    result = stage(
        kind="cells",
        trainable=["vision_tower"],
        data={"synthetic": {"count": 30 * GLOBAL_BATCH, "seed": 6}},
    )
    history = losses(result)
    assert sum(history[-5:]) < 0.7 * sum(history[:5])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init_from": "/no/such/model"}, CheckpointError, "no model folder '/no/such/model'"),
        ({"data": {"parquet": "/no/such/table"}}, ConfigError, "/no/such/table' does not exist"),
        ({"output_dir": "/proc/flashvl"}, ConfigError, "output /proc/flashvl cannot be written"),
        ({"output_dir": "/etc/hosts"}, ConfigError, "output_dir=/etc/hosts is a file"),
        ({"output_dir": "/etc"}, ConfigError, "and no training that was begun"),
        ({"num_workers": 9}, ConfigError, "num_workers (9) needs 10 CPUs"),
        ({"num_trainable_params": 7}, ConfigError, "to train, and num_trainable_params is 7"),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(
    stage: Stage, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        stage(**changes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_finished_stage_is_told_again_and_not_run(stage: Stage, two_workers: StageResult) -> None:
    log = Path(two_workers.checkpoint) / "training_log.json"
    before = log.stat()
    assert stage(output_dir=two_workers.checkpoint, num_workers=1) == two_workers
    assert log.stat() == before


def test_a_second_run_on_the_same_output_is_refused(stage: Stage, tmp_path: Path) -> None:
    with held(locate(tmp_path)), pytest.raises(ConfigError, match="another job is running"):
        stage(output_dir=tmp_path)


def test_another_recipe_on_the_same_output_is_refused(
    stage: Stage, two_workers: StageResult
) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate was 0.001 and is 0.002"):
        stage(output_dir=two_workers.checkpoint, learning_rate=2e-3)
