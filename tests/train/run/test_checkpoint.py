"""The folder of checkpoints: when one counts, which are kept, and what a full disk leaves."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from flashvl.data.storage import Location, locate
from flashvl.errors import CheckpointError, FlashVLError
from flashvl.train.run.checkpoint import (
    STATE,
    CheckpointState,
    CheckpointWriter,
    checkpoint_folder,
    list_checkpoints,
    remove_incomplete,
    remove_old,
)
from flashvl.train.run.shards import ShardReader
from flashvl.train.run.zero import Fragment
from tests.support.stores import s3_bucket

TENSORS = {"weight/layer/0": torch.arange(1000.0)}


def state(step: int, **changes: Any) -> CheckpointState:
    values: dict[str, Any] = {
        "step": step,
        "adam_step": step,
        "shards": ("shard-0000-test.safetensors",),
        "num_trained": 8 * step,
        "num_dead": 0,
        "num_skipped": 0,
        "num_skipped_in_a_row": 0,
        "recent_losses": (1.0,),
        "loss": 1.0,
        "eval_loss": None,
        "seconds": 1.0,
    }
    return CheckpointState(**values | changes)


def write(output: Location, step: int, **changes: Any) -> None:
    writer = CheckpointWriter(output, 0, "test")
    writer.start(step, TENSORS)
    writer.wait()
    assert writer.written_step() == step
    writer.complete(lambda: write_state(output, step, **changes))
    writer.wait()
    assert writer.pending_step == 0


def write_state(output: Location, step: int, **changes: Any) -> None:
    text = state(step, **changes).model_dump_json()
    (checkpoint_folder(output, step) / STATE).write(text.encode())


def steps(output: Location) -> list[int]:
    return [checkpoint.state.step for checkpoint in list_checkpoints(output)]


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    if request.param == "local":
        yield locate(tmp_path / "run")
        return
    with s3_bucket() as (_, uri):
        yield locate(uri.format(request.node.originalname))  # a new server keeps what another had


def test_a_checkpoint_counts_once_its_state_is_written(output: Location) -> None:
    assert steps(output) == []
    write(output, 10)
    writer = CheckpointWriter(output, 0, "killed")
    writer.start(20, TENSORS)
    writer.wait()
    assert steps(output) == [10]
    remove_incomplete(output)
    assert not checkpoint_folder(output, 20).is_folder()
    assert steps(output) == [10]
    with ShardReader(list_checkpoints(output)[0].shards) as reader:
        read = torch.zeros(300)
        reader.fill([Fragment(name="layer", start=50, tensors={"weight": read})])
    assert torch.equal(read, TENSORS["weight/layer/0"][50:350])


def test_the_newest_and_the_best_are_kept(output: Location) -> None:
    for step, eval_loss in ((1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, None)):
        write(output, step, eval_loss=eval_loss)
        remove_old(output, num_kept=2)
    assert steps(output) == [2, 4, 5]


def test_an_unreadable_state_makes_the_one_before_the_newest(tmp_path: Path) -> None:
    output = locate(tmp_path)
    write(output, 1)
    write(output, 2)
    (checkpoint_folder(output, 2) / STATE).write(b"{")
    assert steps(output) == [1]


def test_a_missing_slice_is_told_and_not_guessed(tmp_path: Path) -> None:
    output = locate(tmp_path)
    write(output, 1)
    with ShardReader(list_checkpoints(output)[0].shards) as reader:
        for name, start, length in (("layer", 990, 20), ("other", 0, 5)):
            wanted = {"weight": torch.zeros(length)}
            with pytest.raises(CheckpointError, match=f"lacks weight/{name}"):
                reader.fill([Fragment(name=name, start=start, tensors=wanted)])


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Let the kernel refuse to make a file longer, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    output = locate(tmp_path)
    write(output, 10)
    writer = CheckpointWriter(output, 0, "full")
    with small_files(1000):
        writer.start(20, TENSORS)
        with pytest.raises(FlashVLError, match="checkpoint of step 20 cannot be written") as raised:
            writer.wait()
    assert "complete are those of step 10: make room" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert steps(output) == [10]
    remove_incomplete(output)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
