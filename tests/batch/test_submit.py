"""`ray job submit`, as the README has it, to a cluster that asks for a token and lacks the package.

The cluster's Python is the one that the environment was made from, with the environment's packages
on its path: an editable installation is known to the environment's own Python only.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.cluster import free_ports, wait_until
from tests.support.jobs import picture, rows_of

ROOT = Path(__file__).parents[2]
NUM_ROWS = 40


@pytest.fixture(scope="module")
def dashboard(starts_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster that `ray start` has made."""
    python = Path(sys.base_prefix) / "bin"
    environment = os.environ | {
        "PATH": f"{python}:{os.environ['PATH']}",
        "PYTHONPATH": sysconfig.get_path("purelib"),
    }
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    line = [python / "python3", "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    line += [f"--{name}={port}" for name, port in ports.items()]
    line += ["--num-cpus=4", "--dashboard-host=127.0.0.1"]
    head = subprocess.Popen(line, env=environment, cwd=tmp_path_factory.mktemp("elsewhere"))
    try:
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        wait_until(lambda: submit(address, "true").returncode == 0, 120)
        yield address
    finally:
        head.terminate()
        head.wait(timeout=60)


def submit(
    dashboard: str, *line: str, working_dir: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    ray = Path(sys.executable).with_name("ray")
    where = [] if working_dir is None else ["--working-dir", str(working_dir)]
    return subprocess.run(
        [ray, "job", "submit", "--address", dashboard, *where, "--", *line],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_job_is_submitted_with_a_token_and_brings_the_package(
    dashboard: str, tiny_random: Path, tmp_path: Path
) -> None:
    table = pa.table({"image": [picture(row) for row in range(NUM_ROWS)]})
    pq.write_table(table, tmp_path / "in.parquet")
    job = ("python", "ray_jobs/caption.py", str(tmp_path / "in.parquet"))
    job += ("--output", str(tmp_path / "out"), "--model", str(tiny_random), "--max-new-tokens=4")

    there = submit(dashboard, "python", "-c", "import torch, flashvl")
    assert "No module named 'flashvl'" in there.stdout
    refused = submit(dashboard, *job, working_dir=ROOT, RAY_AUTH_TOKEN="wrong")
    assert refused.returncode != 0 and "nvalid" in refused.stdout

    told = submit(dashboard, *job, working_dir=ROOT)
    assert told.returncode == 0, told.stdout
    assert f"{NUM_ROWS} images, {NUM_ROWS} captions, 0 dead letters" in told.stdout
    assert sorted(rows_of(tmp_path / "out")) == list(range(NUM_ROWS))
