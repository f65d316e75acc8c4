"""Processes that form a gloo group, as Ray Train's workers do, without Ray."""

import os
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import distributed


def run_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Call `function(*arguments)` in each of `num_ranks` processes; fail if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        ranks = [
            context.Process(
                target=_run, args=(function, rank, num_ranks, Path(folder) / "store", arguments)
            )
            for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * num_ranks


def _run(
    function: Callable[..., None], rank: int, num_ranks: int, store: Path, arguments: tuple[Any]
) -> None:
    import torch

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks
    )
    function(*arguments)
    distributed.barrier()
    distributed.destroy_process_group()
