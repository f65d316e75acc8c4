"""Many rows through a small object store: no process's memory grows, and nothing spills."""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray._private.internal_api import memory_summary
from ray.cluster_utils import Cluster

from tests.support.jobs import picture

NUM_ROWS = 50_000
STORE_BYTES = 300 * 2**20
WARM_UP_S = 60.0
GROWTH_MB = 100.0
"""Growth after the first minute that allocators explain, and rows would exceed."""


@pytest.fixture
def cluster(starts_ray: None) -> Iterator[Cluster]:
    node = {"num_cpus": 4, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster
    cluster.shutdown()


def write_input(path: Path) -> None:
    pictures = [picture(seed, "JPEG") for seed in range(150)]
    schema = pa.schema({"image": pa.binary()})
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, NUM_ROWS, 5000):
            images = [pictures[row % 150] for row in range(first, first + 5000)]
            writer.write_table(pa.table({"image": images}, schema=schema))


def resident_mb(processes: list[psutil.Process]) -> dict[tuple[int, str], float]:
    """Memory of each process, without what it maps of the object store."""
    found = {}
    for process in processes:
        try:
            memory = process.memory_info()
            title = " ".join(process.cmdline())[:80]
        except psutil.Error:
            continue  # it ended meanwhile
        found[process.pid, title] = (memory.rss - memory.shared) / 2**20
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat_and_nothing_spills(
    cluster: Cluster, tiny_random: Path, tmp_path: Path
) -> None:
    write_input(tmp_path / "in.parquet")
    line = [sys.executable, "-m", "flashvl", "caption", str(tmp_path / "in.parquet")]
    line += ["--output", str(tmp_path / "out"), "--model", str(tiny_random)]
    line += ["--max-new-tokens=2", "--json"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    raylet = psutil.Process(cluster.head_node.all_processes["raylet"][0].process.pid)
    early: dict[tuple[int, str], float] = defaultdict(float)
    late: dict[tuple[int, str], float] = defaultdict(float)
    driver = subprocess.Popen(line, env=environment)
    began_s = time.monotonic()
    while driver.poll() is None:
        is_early = time.monotonic() - began_s < WARM_UP_S
        processes = [psutil.Process(driver.pid), *raylet.children(recursive=True)]
        peaks = early if is_early else late
        for process, now_mb in resident_mb(processes).items():
            peaks[process] = max(peaks[process], now_mb)
        time.sleep(1)
    assert driver.returncode == 0
    assert len(late) > 3, "the job must last longer than the first minute"
    grown = {process: late[process] - early.get(process, 0.0) for process in late}
    # A worker that began later has no first minute to be compared with; it must be no larger than
    # those that did.
    largest = max(early.values())
    for process, growth_mb in grown.items():
        told = f"{process}: {early.get(process, 0):.0f} -> {late[process]:.0f} MB"
        is_new = process not in early
        assert growth_mb < GROWTH_MB or (is_new and late[process] < largest), told

    ray.init(cluster.address, log_to_driver=False)
    try:
        assert "Spilled" not in memory_summary(stats_only=True)
    finally:
        ray.shutdown()
