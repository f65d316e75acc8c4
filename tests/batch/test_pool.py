"""A pool of engines that follows the cluster."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from tests.support.cluster import workers
from tests.support.jobs import picture, rows_of

NUM_ROWS = 6000


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_engines_come_with_a_node(tiny_random: Path, tmp_path: Path) -> None:
    table = pa.table({"image": [picture(row % 150) for row in range(NUM_ROWS)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=500)
    node = {"num_cpus": 3, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node)

    def most_engines(seconds: float, enough: int) -> int:
        """The most engines at once, until there are enough or the seconds are over."""
        most, began_s = 0, time.monotonic()
        while job.poll() is None and time.monotonic() - began_s < seconds and most < enough:
            most = max(most, len(workers(cluster, "ray::MapWorker(MapBatches(Captioner")))
            time.sleep(1)
        return most

    line = [sys.executable, "-m", "flashvl", "caption", str(tmp_path / "in.parquet")]
    line += ["--output", str(tmp_path / "out"), "--model", str(tiny_random)]
    line += ["--max-new-tokens=32", "--max-num-seqs=16", "--replicas=1:8"]
    job = subprocess.Popen(line, env=os.environ | {"RAY_ADDRESS": cluster.address})
    try:
        before = most_engines(40, enough=4)
        assert 1 <= before < 4  # the cluster has no room for more
        cluster.add_node(**node)
        assert most_engines(90, enough=before + 1) > before
        assert job.wait() == 0
        assert sorted(rows_of(tmp_path / "out")) == list(range(NUM_ROWS))
    finally:
        job.terminate()
        job.wait(timeout=120)
        cluster.shutdown()
