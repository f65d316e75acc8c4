"""On a cluster whose head has no CPUs, the ingress and the drivers of jobs run on workers."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.support.cluster import wait_until
from tests.support.images import encode, noise
from tests.support.serving import Deployment, deploying

TINY = Path(__file__).parents[2] / "serve_configs" / "tiny.yaml"


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.slow
def test_the_ingress_is_spread_over_workers_and_replaced_in_turn(tmp_path: Path) -> None:
    # The nodes are one machine: they cannot have a proxy each at the same port.
    config = yaml.safe_load(TINY.read_text()) | {"proxy_location": "HeadOnly"}
    config["applications"][0]["args"]["batch_roots"] = [str(tmp_path)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(encode(noise(0)))
    with deploying(num_cpus=0) as deployment:
        cluster = deployment.cluster
        head = cluster.head_node.node_id
        workers = {cluster.add_node(num_cpus=3).node_id for _ in range(2)}
        deployment.deploy(config)
        ingress = replicas(deployment, "Ingress")
        assert set(ingress.values()) == workers

        request = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
        batch = requests.post(f"{deployment.url}/v1/batches", json=request, timeout=60).json()
        url = f"{deployment.url}/v1/batches/{batch['id']}"
        wait_until(lambda: requests.get(url, timeout=30).json()["status"] == "completed", 180)
        assert driver_node(deployment, batch["id"]) != head

        changed = copy.deepcopy(config)
        changed["applications"][0]["args"]["max_images"] = 3
        deployment.deploy(changed)
        wait_until(lambda: not ingress.keys() & replicas(deployment, "Ingress").keys(), 120)
        assert set(replicas(deployment, "Ingress").values()) == workers


def replicas(deployment: Deployment, name: str) -> dict[str, str]:
    """The replicas of a deployment that run, each with the id of its node."""
    found: list[dict[str, Any]] = deployment.status()["deployments"][name]["replicas"]
    return {each["replica_id"]: each["node_id"] for each in found if each["state"] == "RUNNING"}


def driver_node(deployment: Deployment, job: str) -> str:
    """The id of the node on which the driver of a job ran."""
    headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    told = requests.get(f"{deployment.dashboard}/api/jobs/{job}", headers=headers, timeout=30)
    node: str = told.json()["driver_node_id"]
    return node
