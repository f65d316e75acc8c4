"""DeepSpeed's states on disk: written by any number of ranks at any ZeRO stage, read by any other.

The truth is the full tensors, which a run without ZeRO on one rank holds.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

from flashvl.data.storage import locate
from flashvl.train.recipe import RECIPES
from flashvl.train.run.export import gathered
from flashvl.train.run.shards import ShardReader, copy_to_host, write_shard
from flashvl.train.run.zero import (
    adam_step,
    drop_gradients,
    is_replicated,
    publish,
    read_fragments,
    start_engine,
)
from tests.support.ranks import run_ranks

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")
ROWS, SIZE = 12, 5


def make_engine(stage: int, precision: str, seed: int = 0) -> Any:
    """A network of odd sizes, of which one layer is frozen and two have rates of their own."""
    recipe = RECIPES["supervised"].model_validate(
        {
            "kind": "supervised",
            "stage": "test",
            "init_from": "none",
            "output_dir": "none",
            "data": {"synthetic": {"count": 1}},
            "zero_stage": stage,
            "precision": precision,
            "use_gpu": False,
        }
    )
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Linear(SIZE, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 11), nn.Linear(11, 1)
    )
    module[2].requires_grad_(False)
    slow, fast = list(module[0].parameters()), [*module[3].parameters(), *module[4].parameters()]
    groups = [{"params": slow, "lr": 1e-2}, {"params": fast, "lr": 3e-2}]
    return start_engine(module, groups, recipe)


def make_step(engine: Any, step: int, is_dropped: bool = False) -> None:
    """One update on `ROWS` rows that depend on `step` only, in two micro-batches on each rank."""
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, SIZE, generator=generator).to(next(engine.parameters()).dtype)
    mine = inputs[rank::num_ranks]
    halves = mine.split((len(mine) + 1) // 2)
    for number, half in enumerate(halves):
        engine.set_gradient_accumulation_boundary(number == len(halves) - 1)
        loss = engine(half).square().sum() / ROWS * num_ranks
        engine.backward(loss * (float("nan") if is_dropped and number else 1.0))
    if is_dropped:
        drop_gradients(engine)
    else:
        engine.step()


def save(engine: Any, folder: Path) -> None:
    rank = distributed.get_rank()
    if rank == 0 or not is_replicated(engine):
        tensors = copy_to_host(read_fragments(engine))
        write_shard(locate(folder / f"shard-{rank}.safetensors"), tensors)
    distributed.barrier()


def load(engine: Any, folder: Path, step: int) -> None:
    with ShardReader([locate(path) for path in sorted(folder.iterdir())]) as reader:
        reader.fill(read_fragments(engine))
    publish(engine, step)


def write_all(folder: Path) -> None:
    """Train for three steps at each stage and precision, of which one is dropped; keep the states.

    A dropped step has gradients that are NaN, of which nothing may be left.
    """
    for stage, precision in itertools.product(STAGES, PRECISIONS):
        engine = make_engine(stage, precision)
        for step in range(4):
            make_step(engine, step, is_dropped=step == 2)
        assert adam_step(engine) == 3
        save(engine, made(folder / f"{precision}-{stage}-{distributed.get_world_size()}"))


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_all(folder: Path, scratch: Path, reads_every_stage: bool) -> None:
    """Read every checkpoint: what is written again is the same, bit for bit, and can be trained.

    Args:
        reads_every_stage: read at each stage, not only at one other stage.
    """
    for number, source in enumerate(sorted(folder.iterdir())):
        precision = source.name.partition("-")[0]
        truth = read_whole(source)
        for stage in STAGES if reads_every_stage else [(number + 2) % len(STAGES)]:
            engine = make_engine(stage, precision, seed=1)
            load(engine, source, 3)
            copy = made(scratch / f"{source.name}-at-{stage}-{distributed.get_world_size()}")
            save(engine, copy)
            found = read_whole(copy)
            assert found.keys() == truth.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, truth[name]), (source.name, stage, name)
            check_weights(engine, truth)
            make_step(engine, 3)
            assert adam_step(engine) == 4


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in full, by its kind and name."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in folder.iterdir():
        for key, tensor in load_file(path).items():
            name, _, start = key.rpartition("/")
            pieces.setdefault(name, {})[int(start)] = tensor
    return {
        name: torch.cat([found[start] for start in sorted(found)]) for name, found in pieces.items()
    }


def check_weights(engine: Any, truth: dict[str, torch.Tensor]) -> None:
    """The engine computes with the weights of the checkpoint, in its own precision."""
    with gathered(engine.module, int(engine.zero_optimization_stage())):
        for name, weight in engine.module.named_parameters():
            if weight.requires_grad:
                wanted = truth[f"weight/{name}"].to(weight.dtype)
                assert torch.equal(weight.detach().flatten(), wanted), name


def compare(folders: list[Path]) -> None:
    """Checkpoints of the same steps are the same but for rounding."""
    truth = read_whole(folders[0])
    for folder in folders[1:]:
        found = read_whole(folder)
        assert found.keys() == truth.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, truth[name], rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_states_move_to_another_stage_and_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(write_all, 2, tmp_path / "written")
    compare(sorted((tmp_path / "written").glob("fp32-*")))
    run_ranks(read_all, 1, tmp_path / "written", tmp_path / "scratch", False)


@pytest.mark.slow
def test_states_move_between_all_stages_and_numbers_of_ranks(tmp_path: Path) -> None:
    for num_ranks in (1, 3):
        run_ranks(write_all, num_ranks, tmp_path / "written")
    compare(sorted((tmp_path / "written").glob("fp32-*")))
    for num_ranks in (1, 2, 4):
        run_ranks(read_all, num_ranks, tmp_path / "written", tmp_path / "scratch", True)
