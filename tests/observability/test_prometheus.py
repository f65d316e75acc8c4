"""A real Prometheus reads a service, a captioning job and a training run, by the files of
`cluster/observability/`: every panel has data, and alerts fire when there is a reason.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import yaml
from ray.cluster_utils import Cluster

from tests.support.cluster import free_ports, head_of_its_own, wait_until
from tests.support.images import encode, noise
from tests.support.observability import FOLDER, expressions, panels
from tests.support.serving import ask, serving

NEEDS_GPU = {"training: MFU of GPUs"}
"""Panels about a peak that is known of GPUs alone."""
PROVOKED = {"FlashvlOverload", "FlashvlDeadLetters"}
NUM_ROWS, NUM_BROKEN = 6000, 1500
NUM_CLIENTS = 4


@pytest.fixture
def cluster(starts_ray: None) -> Iterator[Cluster]:
    head = head_of_its_own(num_cpus=10)
    head["_system_config"] = {"metrics_report_interval_ms": 3000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@contextlib.contextmanager
def prometheus(dashboard: str, folder: Path) -> Iterator[str]:
    """Prometheus with our files, but alerts that do not wait for minutes."""
    shutil.copytree(FOLDER, folder / "files")
    (folder / "token").write_text(os.environ["RAY_AUTH_TOKEN"])
    file = folder / "files" / "prometheus.yml"
    text = file.read_text().replace("http://ray-head:8265", dashboard)
    file.write_text(text.replace("/etc/prometheus/ray-token", str(folder / "token")))
    alerts = folder / "files" / "rules" / "alerts.yml"
    alerts.write_text(re.sub(r"for: \d+m", "for: 5s", alerts.read_text()))
    (port,) = free_ports(1)
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with open(folder / "log", "w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: _is_ready(url), 60)
            yield url
        finally:
            process.terminate()


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=5).ok
    except requests.ConnectionError:
        return False


def ask_prometheus(url: str, path: str, **parameters: str) -> Any:
    answer = requests.get(f"{url}/api/v1/{path}", params=parameters, timeout=30).json()
    assert answer["status"] == "success", answer
    return answer["data"]


@contextlib.contextmanager
def overloading(url: str) -> Iterator[None]:
    """More clients than the service has room for."""
    ended = threading.Event()
    body = {"model": "tiny", "messages": ask("Describe the image.", encode(noise(1)))}
    body |= {"max_tokens": 64, "ignore_eos": True}

    def client() -> None:
        while not ended.is_set():
            answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
            assert answer.status_code in (200, 429)
            ended.wait(0.5)

    threads = [threading.Thread(target=client) for _ in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def command(cluster: Cluster, *arguments: str) -> Iterator[None]:
    """`flashvl` on the cluster, in a process of its own, which is stopped at the end."""
    line = [sys.executable, "-m", "flashvl", *arguments]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with subprocess.Popen(line, env=environment) as process:
        try:
            yield
            assert process.poll() in (None, 0), arguments
        finally:
            process.terminate()


def write_images(file: Path) -> None:
    """A table of small pictures, a quarter of which are broken."""
    images = [encode(noise(row % 16)) for row in range(16)]
    rows = [
        images[row % 16][:100] if row % (NUM_ROWS // NUM_BROKEN) == 0 else images[row % 16]
        for row in range(NUM_ROWS)
    ]
    pq.write_table(pa.table({"id": range(NUM_ROWS), "image": rows}), file, row_group_size=64)


def write_recipe(file: Path, output: Path) -> None:
    recipe = {
        "kind": "supervised",
        "stage": "observed",
        "init_from": "tiny",
        "output_dir": str(output),
        "data": {"synthetic": {"count": 16_000, "seed": 5}},
        "trainable": ["multi_modal_projector"],
        "global_batch_size": 8,
        "token_budget": 1000,
        "max_length": 1000,
        "num_workers": 1,
        "use_gpu": False,
        "precision": "fp32",
        "learning_rate": 1e-4,
        "save_steps": 20,
        "save_total_limit": 1,
    }
    file.write_text(yaml.safe_dump(recipe))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_every_panel_has_data_and_alerts_fire(cluster: Cluster, tmp_path: Path) -> None:
    write_images(tmp_path / "images.parquet")
    write_recipe(tmp_path / "recipe.yaml", tmp_path / "stage")
    dashboard = f"http://{cluster.webui_url}"
    queries = {
        (name, query)
        for name, panel in panels()
        if name not in NEEDS_GPU
        for query in expressions(panel)
    }
    captioning = ("caption", str(tmp_path / "images.parquet"), "--output", str(tmp_path / "out"))
    full = ("--replicas=1:2", "--max-num-seqs=2", "--max-waiting=0")
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(prometheus(dashboard, tmp_path / "prometheus"))
        service = stack.enter_context(serving(*full, RAY_ADDRESS=cluster.address))
        stack.enter_context(overloading(service.url))
        stack.enter_context(
            command(cluster, *captioning, "--max-error-rate=1", "--max-new-tokens=64")
        )
        stack.enter_context(command(cluster, "train", str(tmp_path / "recipe.yaml")))
        fired: set[str] = set()

        def has_everything() -> bool:
            answered = {
                each for each in queries if ask_prometheus(url, "query", query=each[1])["result"]
            }
            queries.difference_update(answered)
            fired.update(
                alert["labels"]["alertname"]
                for alert in ask_prometheus(url, "alerts")["alerts"]
                if alert["state"] == "firing"
            )
            return not queries and fired >= PROVOKED

        try:
            wait_until(has_everything, 480)
        except AssertionError:
            raise AssertionError((queries, fired)) from None
    assert "FlashvlNoReplica" not in fired
