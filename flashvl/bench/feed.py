"""Memory of the feed as the number of rows grows: of the driver, and of the tasks that read rows.

    flashvl bench feed

Each size is measured in processes of its own, from the start of Ray to a few steps. The rows are
those of the procedural world, numbered as the row groups of a table are.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import psutil

from flashvl.progress import ShowProgress, ignore_progress
from flashvl.train.feed.feed import Feed
from flashvl.train.feed.mixture import SyntheticData
from flashvl.train.feed.order import shuffle_tables

ROWS_PER_GROUP = 64
GLOBAL_BATCH = 240
NUM_STEPS = 12
"""Steps that are read before memory is measured."""


PROGRAM = """
import sys
from flashvl.bench.feed import print_growth
from flashvl.entrypoint import start_ray
start_ray()
print_growth(sys.argv[1], int(sys.argv[2]))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Memory with a number of rows, in MB: of a process alone, without what it shares."""

    num_rows: int
    order_mb: float
    """Arrays of the order, which the driver holds and tasks map from shared memory."""
    bitmap_mb: float
    """A bit a row, for the rows that are consumed."""
    driver_mb: float
    """The driver, with both."""
    worker_mb: float
    """The largest task process."""


def measure_growth(
    model: str, sizes: Sequence[int], on_progress: ShowProgress = ignore_progress
) -> list[Growth]:
    """Measure each size in a fresh process with a Ray of its own."""
    found = []
    for number, size in enumerate(sizes):
        on_progress(number, len(sizes), f"{size} rows")
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, model, str(size)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.append(Growth(**json.loads(done.stdout.splitlines()[-1])))
    return found


def print_growth(model: str, num_rows: int) -> None:
    """Measure this process and its Ray, and print the figures as a line of JSON."""
    groups = np.full(-(-num_rows // ROWS_PER_GROUP), ROWS_PER_GROUP, np.int64)
    order = shuffle_tables([groups], [num_rows], GLOBAL_BATCH, seed=0)
    bitmap = np.ones(-(-num_rows // 8), np.uint8)
    feed = Feed(
        order=order,
        source=SyntheticData(count=num_rows, words_share=1.0),
        kind="supervised",
        model=model,
        max_length=1024,
        token_budget=4096,
    )
    dataset = feed.dataset(0, 1)
    dataset.context.execution_options.preserve_order = True
    blocks = dataset.iter_batches(batch_size=1, batch_format="pyarrow")
    worker_mb = 0.0
    for _, _ in zip(range(NUM_STEPS), blocks, strict=False):
        worker_mb = max(worker_mb, _largest_task_mb())
    growth = Growth(
        num_rows=num_rows,
        order_mb=(order.starts.nbytes + order.ends.nbytes) / 1e6,
        bitmap_mb=bitmap.nbytes / 1e6,
        driver_mb=psutil.Process().memory_full_info().uss / 1e6,
        worker_mb=worker_mb,
    )
    sys.stdout.write(json.dumps(asdict(growth)) + "\n")


def _largest_task_mb() -> float:
    """Memory of the largest of Ray's processes now; those that are idle may end at any time."""
    largest = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::"):
                largest = max(largest, process.memory_full_info().uss / 1e6)
        except psutil.Error:
            continue  # it ended meanwhile
    return largest
