"""A job that is run until it is done, on a cluster of four nodes that keeps losing processes.

Whatever dies, and wherever, every row is there once, and the captions are those of a quiet day.
"""

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from flashvl.batch.job import run_caption_job
from tests.support.cluster import workers
from tests.support.jobs import make_job, picture, rows_of

NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
MIN_LIFE_S = 15.0
"""Seconds for which the driver lives at least: it starts in ten, and would else never get on."""


def write_input(path: Path, num_rows: int) -> Path:
    """Share of the rows that are bad."""
    images = [
        b"no image" if row % 100 in (7, 31, 32) else picture(row % 150) for row in range(num_rows)
    ]
    pq.write_table(pa.table({"image": images}), path, row_group_size=400)
    return path


def command(source: Path, output: Path, model: Path) -> list[str]:
    """`flashvl caption`, which writes a file every few rows rather than every minute."""
    code = (
        "import flashvl.data.ledger.tables as o; o.BYTES_PER_FILE = 10_000;"
        "from flashvl.cli import main; main()"
    )
    options = [
        "--model",
        str(model),
        "--dtype",
        "float32",
        "--max-new-tokens",
        "4",
        "--max-num-seqs",
        "16",
    ]
    options += ["--max-error-rate", "0.05", "--replicas", "1:2"]
    return [sys.executable, "-c", code, "caption", str(source), "--output", str(output), *options]


@pytest.fixture
def cluster(starts_ray: None) -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    for _ in range(3):
        cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def kill_one(
    kind: str, cluster: Cluster, driver: subprocess.Popen[bytes], rng: random.Random
) -> bool:
    """Kill one process of this kind, if there is any."""
    if kind == "driver":
        driver.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        driver.wait(timeout=120)
        return True
    if kind == "raylet":
        node = rng.choice(sorted(cluster.worker_nodes, key=id))
        with contextlib.suppress(ProcessLookupError):  # it may have died with one of `AGENTS`
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(**NODE)
        return True
    title = {"engine": "ray::MapWorker(MapBatches(Captioner", "worker": "ray::"}[kind]
    found = workers(cluster, title)
    if found:
        rng.choice(found).kill()
    return bool(found)


def run_until_done(
    line: list[str], cluster: Cluster, rng: random.Random, max_kills: int
) -> Counter[str]:
    """Run the command again and again until it succeeds; returns what was killed meanwhile."""
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    killed: Counter[str] = Counter()
    while True:
        driver = subprocess.Popen(line, env=environment, start_new_session=True)
        began_s = time.monotonic()
        while driver.poll() is None:
            try:
                driver.wait(timeout=rng.uniform(2, 6))
            except subprocess.TimeoutExpired:
                kinds = ["engine", "worker", "raylet"]
                if time.monotonic() - began_s > MIN_LIFE_S:
                    kinds.append("driver")
                if killed.total() < max_kills and began_s + 8 < time.monotonic():
                    kind = rng.choice(kinds)
                    killed[kind] += kill_one(kind, cluster, driver, rng)
        if driver.returncode == 0:
            return killed


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, tiny_random: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[Path, dict[int, dict[str, Any]]]]:
    """Takes a number of rows; gives a table of that size, and its output when nothing is killed."""

    @functools.cache
    def run(num_rows: int) -> tuple[Path, dict[int, dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("undisturbed")
        source = write_input(folder / "in.parquet", num_rows)
        job = make_job(tiny_random, source, folder / "out", max_num_seqs=16, max_error_rate=0.05)
        run_caption_job(job)
        rows = rows_of(folder / "out")
        assert sorted(rows) == list(range(num_rows))
        return source, rows

    return run


@pytest.mark.slow
def test_a_cluster_that_loses_processes_loses_no_row(
    tiny_random: Path,
    tmp_path: Path,
    undisturbed: Callable[[int], tuple[Path, dict[int, dict[str, Any]]]],
    cluster: Cluster,
) -> None:
    source, rows = undisturbed(300)
    line = command(source, tmp_path / "out", tiny_random)
    killed = run_until_done(line, cluster, random.Random(0), max_kills=2)
    assert killed.total() >= 1
    assert rows_of(tmp_path / "out") == rows


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20))
def test_a_large_job_on_a_cluster_that_loses_processes(
    tiny_random: Path,
    tmp_path: Path,
    undisturbed: Callable[[int], tuple[Path, dict[int, dict[str, Any]]]],
    cluster: Cluster,
    seed: int,
) -> None:
    source, rows = undisturbed(5000)
    line = command(source, tmp_path / "out", tiny_random)
    killed = run_until_done(line, cluster, random.Random(seed), max_kills=25)
    assert killed.total() >= 3
    assert rows_of(tmp_path / "out") == rows
    sys.stderr.write(f"seed {seed}: killed {dict(killed)}\n")
