"""A conversion that is killed at random and run again ends as if it had not been disturbed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from tests.support import sets
from tests.support.jobs import write_tar

NUM_TARS, ROWS_PER_TAR = 60, 10
NUM_KILLS = 6
CODE = (
    "import flashvl.data.ledger.tables as o; o.BYTES_PER_FILE = 1;"
    "from flashvl.cli import main; main()"
)


def write_tars(folder: Path) -> None:
    """Samples of which one in 50 is broken."""
    folder.mkdir()
    for number in range(NUM_TARS):
        members = {}
        for row in range(number * ROWS_PER_TAR, (number + 1) * ROWS_PER_TAR):
            text = "stray <image>" if row % 50 == 17 else "<image>\nWhat?"
            fields = {"id": str(row), "conversations": sets.turns(text, f"Answer {row}")}
            members[f"{row:06d}.json"] = json.dumps(fields).encode()
            if row % 50 != 17:
                members[f"{row:06d}.jpg"] = sets.JPEG[row % len(sets.JPEG)]
        write_tar(folder / f"{number:03d}.tar", members)


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    """The command, on the cluster of this process, writing a file for each block that comes."""
    line = [sys.executable, "-c", CODE, "data", "convert", "webdataset", str(source)]
    line += ["--output", str(output), "--max-error-rate", "0.1"]
    address = ray.get_runtime_context().gcs_address
    return subprocess.Popen(line, env=os.environ | {"RAY_ADDRESS": address})


def rows_of(output: Path) -> list[dict[str, Any]]:
    """All rows of an output in the order of the input."""
    found = [
        row
        for name in ("conversations", "dead_letters")
        for row in pq.read_table(output / name).to_pylist()
    ]
    return sorted(found, key=lambda row: row["row"])


def num_files(output: Path) -> int:
    return len(list(output.glob("*/part-*.parquet")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_it_ends_as_if_undisturbed(ray_cluster: None, tmp_path: Path) -> None:
    write_tars(tmp_path / "in")
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert start(tmp_path / "in", whole).wait(timeout=300) == 0

    rng = random.Random(0)
    for kill in range(NUM_KILLS):
        # After some more files, so that each run gets on and none is finished.
        last = num_files(output) + rng.randint(1, NUM_TARS // NUM_KILLS - 1)
        process = start(tmp_path / "in", output)
        while num_files(output) < last and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, f"the command ended with kill {kill} still to come"
        process.kill()
        process.wait()
        assert not (output / "_summary.json").exists()
    assert start(tmp_path / "in", output).wait(timeout=300) == 0

    assert rows_of(output) == rows_of(whole)
    assert [row["row"] for row in rows_of(output)] == list(range(NUM_TARS * ROWS_PER_TAR))
    summary = json.loads((output / "_summary.json").read_text())
    assert (summary["input"], summary["dead"]) == (600, 12)
