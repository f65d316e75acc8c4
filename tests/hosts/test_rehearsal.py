"""The runbook for machines of one's own, followed from nothing.

It comes to a service, a new version of its model, a lost host and a lost head. No request fails
that had not begun.
"""

import contextlib
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

from flashvl.model.loading import SHIPPED
from tests.support.cluster import wait_until
from tests.support.hosts import Host, Network
from tests.support.images import encode, noise
from tests.support.rehearsal import HTTP_PORT, ROOT, Fleet, clients, read_environment
from tests.support.serving import ask

KEY = secrets.token_hex()
VERSIONS = {"v1": "tiny", "v2": "tiny-iss"}
"""Shipped models that are two versions of one; the second cuts an image into more tiles."""

DRAIN_S = 120.0


@pytest.mark.hosts
@pytest.mark.timeout(1200)
def test_the_runbook_for_machines_of_ones_own(network: Network, tmp_path: Path) -> None:
    for version, model in VERSIONS.items():
        shutil.copytree(SHIPPED / model, tmp_path / "models" / version / "flashvl")
    (tmp_path / "api_keys").write_text(f"{KEY}\n")
    fleet = Fleet(network=network, environment=read_environment(RAY_gcs_storage_path="/tmp/ray/g"))
    fleet.start_head()
    workers = [fleet.add_worker(num_cpus=3) for _ in range(3)]
    fleet.wait_for(*workers)
    config = yaml.safe_load((ROOT / "serve_configs" / "tiny.yaml").read_text())
    config["http_options"]["host"] = "0.0.0.0"
    arguments = config["applications"][0]["args"]
    arguments |= {"replicas": "3", "api_keys_file": str(tmp_path / "api_keys")}
    arguments["model"] = str(tmp_path / "models" / "v1" / "flashvl")
    fleet.deploy(config)
    assert requests.get(url_of(workers[0]), timeout=10).status_code == 401
    (before,) = prompt_tokens(workers)

    def is_whole() -> bool:
        """Whether the service runs as it was deployed."""
        deployments = fleet.service().get("deployments", {}).values()
        return bool(deployments) and all(each["status"] == "HEALTHY" for each in deployments)

    @contextlib.contextmanager
    def requests_to(hosts: list[Host], meanwhile: str) -> Iterator[None]:
        options = {"model": "flashvl", "max_tokens": 32, "stream": True}
        with clients(hosts, 2, KEY, **options) as told:
            time.sleep(5)
            yield
            wait_until(is_whole, 180)
            time.sleep(5)
        ends = dict(told.ends)
        sys.stderr.write(f"{meanwhile}: {ends}, p99 {told.quantile(0.99):.2f} s\n")
        outcomes[meanwhile] = set(ends)

    outcomes: dict[str, set[str]] = {}
    with requests_to(workers, "a new version"):
        arguments["model"] = str(tmp_path / "models" / "v2" / "flashvl")
        fleet.deploy(config)
    (after,) = prompt_tokens(workers)
    assert after > before

    *_, drained = workers
    with requests_to(ready(workers, but=drained), "a machine is drained"):
        drained.drain(DRAIN_S)
        workers[-1] = fleet.add_worker(num_cpus=3)
        fleet.wait_for(*workers)

    lost = workers[1]
    with requests_to(ready(workers, but=lost), "a machine is lost"):
        lost.lose()
        wait_until(lambda: lost.address not in fleet.addresses(), 60)
        workers[1] = fleet.add_worker(num_cpus=3)

    with requests_to(ready(workers), "the head crashes"):
        fleet.head.crash()
        wait_until(lambda: not fleet.addresses(), 10)
        fleet.wait_for(*workers)

    may_be_cut = outcomes.pop("a machine is lost")
    assert may_be_cut <= {"done", "cut"}
    assert all(ends == {"done"} for ends in outcomes.values())


def ready(workers: list[Host], but: Host | None = None) -> list[Host]:
    """The workers to which a load balancer would send requests, without one that is to be lost."""
    return [worker for worker in workers if worker is not but and is_ready(worker)]


def is_ready(worker: Host) -> bool:
    try:
        url = f"http://{worker.address}:{HTTP_PORT}/-/healthz"
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False  # no replica runs there, and so no proxy


def url_of(host: Host) -> str:
    return f"http://{host.address}:{HTTP_PORT}/v1/models"


def prompt_tokens(workers: list[Host]) -> set[int]:
    """The numbers of tokens that one prompt takes in the versions of the model that answer."""
    body = {"model": "flashvl", "messages": ask("Describe the image.", encode(noise(0)))}
    found = set()
    for worker in workers * 3:
        url = f"http://{worker.address}:{HTTP_PORT}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = requests.post(url, json=body | {"max_tokens": 1}, headers=headers, timeout=60)
        found.add(answer.json()["usage"]["prompt_tokens"])
    return found
