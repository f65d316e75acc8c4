"""Services in processes of their own, applications deployed on clusters, and requests to them."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml
from ray.cluster_utils import Cluster

from tests.support.cluster import free_ports, head_of_its_own, wait_until
from tests.support.images import data_url

START_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """`flashvl serve` in a process of its own."""

    url: str
    process: subprocess.Popen[str]


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[Service]:
    (port,) = free_ports(1)
    line = [sys.executable, "-m", "flashvl", "serve", f"--port={port}", *options]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        line,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a test can signal all its processes, as a terminal does
    )
    assert process.stdout is not None
    try:
        deadline_s = time.monotonic() + START_S
        for said in process.stdout:
            if url in said:
                break
            assert time.monotonic() < deadline_s
        else:
            raise AssertionError(f"flashvl serve ended with status {process.wait()}")
        # What it prints later must not fill the pipe.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield Service(url=url, process=process)
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


@dataclass(kw_only=True)
class Deployment:
    """An application that `serve deploy` puts on a cluster, and replaces there."""

    cluster: Cluster
    dashboard: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploy the configuration, and wait until the application runs as it says."""
        config = config | {"http_options": {"host": "127.0.0.1", "port": self.port}}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(config, file)
            file.flush()
            serve = Path(sys.executable).with_name("serve")
            line = [serve, "deploy", file.name, "--address", self.dashboard]
            subprocess.run(line, check=True, timeout=120)
        wait_until(lambda: self.status()["status"] == "RUNNING", 240)

    def status(self) -> dict[str, Any]:
        """Serve's own description of the application."""
        url = f"{self.dashboard}/api/serve/applications/"
        headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        told = requests.get(url, headers=headers, timeout=30)
        return told.json()["applications"]["flashvl"]

    def replicas(self) -> dict[str, int]:
        """The ids of the replicas that run, each with the id of its process."""
        replicas = self.status()["deployments"]["EngineReplica"]["replicas"]
        return {each["replica_id"]: each["pid"] for each in replicas if each["state"] == "RUNNING"}


@contextmanager
def deploying(num_cpus: int = 6) -> Iterator[Deployment]:
    """Start a cluster for an application."""
    head = head_of_its_own(num_cpus)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    dashboard = f"http://127.0.0.1:{head['dashboard_port']}"
    (port,) = free_ports(1)
    try:
        yield Deployment(cluster=cluster, dashboard=dashboard, port=port)
    finally:
        cluster.shutdown()


def wait_until_idle(url: str) -> None:
    def is_idle() -> bool:
        load = requests.get(f"{url}/readyz", timeout=10).json()
        return (load["running"], load["waiting"]) == (0, 0)

    wait_until(is_idle, 30)


def ask(text: str, *images: bytes) -> list[dict[str, object]]:
    """The messages of one user turn with images, in OpenAI's form."""
    parts: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
