"""A service that the tests of this folder share: `tiny` over HTTP on a Ray of its own."""

import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
import yaml
from PIL import Image
from ray.cluster_utils import Cluster

START_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """`flashvl serve` in a process of its own."""

    url: str
    process: subprocess.Popen[str]


def free_ports(count: int) -> list[int]:
    """No two alike, as they are all held at once."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def head_of_its_own(num_cpus: int) -> dict[str, Any]:
    """Of a cluster with ports of its own for what Ray has one of on a machine."""
    names = ("dashboard_port", "dashboard_agent_listen_port", "metrics_export_port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    return {"num_cpus": num_cpus, "include_dashboard": True} | ports


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
        start_new_session=True,  # what a terminal tells a command and all that it started
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


@pytest.fixture(scope="session")
def batch_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One node, whose agent takes jobs."""
    cluster = Cluster(initialize_head=True, head_node_args=head_of_its_own(num_cpus=4))
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def service(cluster: Cluster, batch_root: Path) -> Iterator[Service]:
    """Answers in fp32, so that the engine in the tests' process says the same."""
    options = ("--dtype=float32", f"--batch-root={batch_root}", "--max-num-seqs=8")
    with serving(*options, RAY_ADDRESS=cluster.address) as started:
        yield started


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    """Of the service; and what a test leaves behind must be nothing."""
    yield service.url
    wait_until_idle(service.url)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


@dataclass(kw_only=True)
class Deployment:
    """An application that `serve deploy` has put on a cluster, and puts there anew."""

    cluster: Cluster
    dashboard: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, config: dict[str, Any]) -> None:
        """Hand it to Serve and wait until it runs as the configuration says."""
        config = config | {"http_options": {"host": "127.0.0.1", "port": self.port}}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(config, file)
            file.flush()
            serve = Path(sys.executable).with_name("serve")
            line = [serve, "deploy", file.name, "--address", self.dashboard]
            subprocess.run(line, check=True, timeout=120)
        wait_until(lambda: self.status()["status"] == "RUNNING", 240)

    def status(self) -> dict[str, Any]:
        """Of the application, as Serve tells it."""
        url = f"{self.dashboard}/api/serve/applications/"
        headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        told = requests.get(url, headers=headers, timeout=30)
        return told.json()["applications"]["flashvl"]

    def replicas(self) -> dict[str, int]:
        """Of the engines that run: each one's id, and its process's."""
        replicas = self.status()["deployments"]["EngineReplica"]["replicas"]
        return {each["replica_id"]: each["pid"] for each in replicas if each["state"] == "RUNNING"}


@contextmanager
def deploying(num_cpus: int = 6) -> Iterator[Deployment]:
    """A cluster for an application."""
    head = head_of_its_own(num_cpus)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    dashboard = f"http://127.0.0.1:{head['dashboard_port']}"
    (port,) = free_ports(1)
    try:
        yield Deployment(cluster=cluster, dashboard=dashboard, port=port)
    finally:
        cluster.shutdown()


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.5)


def wait_until_idle(url: str) -> None:
    def is_idle() -> bool:
        load = requests.get(f"{url}/readyz", timeout=10).json()
        return (load["running"], load["waiting"]) == (0, 0)

    wait_until(is_idle, 30)


def encode(image: Image.Image, image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def noise(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def ask(text: str, *images: bytes) -> list[dict[str, object]]:
    """OpenAI's messages of one turn."""
    parts: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
