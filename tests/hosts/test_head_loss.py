"""The head dies while clients ask and a job runs: nobody notices but the runbook's reader."""

import json
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import wait_until
from tests.support.hosts import Host, Network
from tests.support.rehearsal import ROOT, Fleet, clients, read_environment

JOB = """
import pathlib
import sys
import time

import ray

@ray.remote
def second():
    time.sleep(1)

while not pathlib.Path(sys.argv[1]).exists():
    ray.get(second.remote())
"""
"""A job that leaves the cores to the service, and ends when a file is there."""
OUTAGE_S = 15.0


def start_redis(network: Network) -> dict[str, str]:
    """Redis on a host of its own; returns what is then in `ray.env`."""
    host = network.add_host()
    line = ["redis-server", "--bind", host.address, "--requirepass", "secret", "--save", ""]
    host.popen(line, "redis.log")
    return {
        "RAY_REDIS_ADDRESS": f"{host.address}:6379",
        "RAY_external_storage_namespace": "flashvl",
        "RAY_START_OPTIONS": "--redis-password=secret",
        "RAY_gcs_storage": "",
        "RAY_gcs_storage_path": "",
    }


@pytest.mark.hosts
@pytest.mark.parametrize("store", ["redis", "rocksdb"])
def test_a_head_is_lost_and_nobody_notices(store: str, network: Network, tmp_path: Path) -> None:
    if store == "redis":
        if shutil.which("redis-server") is None:
            pytest.skip("Redis is not installed")
        environment = read_environment(**start_redis(network))
    else:
        environment = read_environment(RAY_gcs_storage_path="/tmp/ray/gcs")
    fleet = Fleet(network=network, environment=environment)
    fleet.start_head()
    workers = [fleet.add_worker(num_cpus=5) for _ in range(2)]
    fleet.wait_for(*workers)
    config = yaml.safe_load((ROOT / "serve_configs" / "tiny.yaml").read_text())
    config["http_options"]["host"] = "0.0.0.0"
    config["applications"][0]["args"]["replicas"] = "2"
    fleet.deploy(config)
    may_end = tmp_path / "may_end"
    fleet.submit("job", "python", "-c", JOB, str(may_end))
    wait_until(lambda: fleet.job("job")["status"] == "RUNNING", 60)

    with clients(workers, rate_per_s=4):  # the first requests are slow
        time.sleep(10)
    with clients(workers, rate_per_s=4) as told:
        time.sleep(10)
        fleet.head.stop_units()
        time.sleep(OUTAGE_S)
        fleet.start_head()
        began_s = time.time()
        wait_until(lambda: fleet.service()["status"] == "RUNNING", 60)
        shown_s = time.time() - began_s
        time.sleep(30)
        assert fleet.job("job")["status"] == "RUNNING"
    may_end.touch()
    fleet.wait_for_job("job", 120)
    back_s = recovered_at(fleet.head) - began_s
    sys.stderr.write(
        f"{store}: {dict(told.ends)}, p50 {told.quantile(0.5):.3f} s, p99 {told.quantile(0.99):.2f}"
        f" s; Serve's controller was back after {back_s:.1f} s, the dashboard after"
        f" {shown_s:.1f} s\n"
    )
    assert set(told.ends) == {"done"}
    assert max(told.seconds) < OUTAGE_S  # no request waited for the head


def recovered_at(head: Host) -> float:
    """When Serve's controller last knew all its replicas again, by its own log, in seconds."""
    logs = head.folder.glob("session_*/logs/serve/controller_*.log")
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return max(
        datetime.strptime(record["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        for record in records
        if record["message"].startswith("Finished recovering")
    )
