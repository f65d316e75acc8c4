"""A real Prometheus reads a service, a captioning job and a training run, by the files of
`cluster/observability/`: every panel has data, and alerts fire when there is a reason.
"""

import contextlib
import math
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
GROUNDLESS = {"FlashvlNoReplica", "FlashvlServiceSilent", "FlashvlServerErrors"}
NUM_ROWS, NUM_STEPS = 40_000, 600
"""More than the test waits for: it stops both jobs. The steps' rows are five windows, whose tasks
leave CPUs of the cluster to the held-out rows."""
FULL = ("--replicas=1:2", "--max-num-seqs=2", "--max-waiting=0")
NUM_CLIENTS = 6
"""Two more than both replicas have slots."""


@pytest.fixture
def cluster(starts_ray: None) -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args=head_of_its_own(num_cpus=10))
    yield cluster
    cluster.shutdown()


@contextlib.contextmanager
def prometheus(dashboard: str, folder: Path) -> Iterator[str]:
    """Prometheus with our files, but one cluster, and alerts that do not wait for minutes."""
    shutil.copytree(FOLDER, folder / "files")
    (folder / "token").write_text(os.environ["RAY_AUTH_TOKEN"])
    file = folder / "files" / "prometheus.yml"
    config = yaml.safe_load(file.read_text())
    (scraped,) = config["scrape_configs"]
    (head, _) = scraped["http_sd_configs"]
    head["url"] = re.sub(r"http://[^/]+", dashboard, head["url"])
    head["authorization"]["credentials_file"] = str(folder / "token")
    scraped["http_sd_configs"] = [head]
    file.write_text(yaml.safe_dump(config))
    alerts = folder / "files" / "rules" / "alerts.yml"
    alerts.write_text(re.sub(r"for: \d+m", "for: 5s", alerts.read_text()))
    (port,) = free_ports(1)
    line = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with open(folder / "log", "w") as log, running(*line, stderr=log):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _is_ready(url), 60)
        yield url


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=5).ok
    except requests.ConnectionError:
        return False


def ask_prometheus(url: str, path: str, **parameters: str) -> Any:
    answer = requests.get(f"{url}/api/v1/{path}", params=parameters, timeout=30).json()
    assert answer["status"] == "success", answer
    return answer["data"]


def has_data(url: str, query: str) -> bool:
    """Whether the query's answer has a number."""
    found = ask_prometheus(url, "query", query=query)["result"]
    return any(math.isfinite(float(series["value"][1])) for series in found)


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
def running(*line: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is told to end with the block, and is killed if it does not."""
    with subprocess.Popen(line, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def write_images(file: Path) -> None:
    """A table of small pictures, a quarter of which are broken."""
    images = [encode(noise(row)) for row in range(4)]
    images[0] = images[0][:100]
    rows = {"id": range(NUM_ROWS), "image": images * (NUM_ROWS // len(images))}
    pq.write_table(pa.table(rows), file, row_group_size=1000)


def write_recipe(file: Path, output: Path) -> None:
    recipe = {
        "kind": "supervised",
        "stage": "observed",
        "init_from": "tiny",
        "output_dir": str(output),
        "data": {"synthetic": {"count": 8 * NUM_STEPS, "seed": 5}},
        "eval_data": {"synthetic": {"count": 8, "seed": 6}},
        "eval_steps": 20,
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


def queries(*dashboards: str) -> set[tuple[str, str]]:
    """The queries of the dashboards' panels, each with its panel's name."""
    return {
        (name, query)
        for name, panel in panels()
        if name.startswith(dashboards) and name not in NEEDS_GPU
        for query in expressions(panel)
    }


def wait_for(url: str, missing: set[tuple[str, str]], alerts: set[str], job: Any) -> set[str]:
    """Wait until all queries have had data and the alerts have fired, while the job runs.

    Returns:
        All alerts that have fired.
    """
    fired: set[str] = set()

    def has_everything() -> bool:
        missing.difference_update([each for each in missing if has_data(url, each[1])])
        now = ask_prometheus(url, "alerts")["alerts"]
        fired.update(each["labels"]["alertname"] for each in now if each["state"] == "firing")
        assert job.poll() is None, f"the job has ended; {missing=}, {fired=}"
        return not missing and fired >= alerts

    try:
        wait_until(has_everything, 300)
    except AssertionError as error:
        raise AssertionError(f"{error}; {missing=}, {fired=}") from None
    return fired


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_every_panel_has_data_and_alerts_fire(cluster: Cluster, tmp_path: Path) -> None:
    images, recipe = tmp_path / "images.parquet", tmp_path / "recipe.yaml"
    write_images(images)
    write_recipe(recipe, tmp_path / "stage")
    environment = os.environ | {"RAY_ADDRESS": cluster.address}

    def flashvl(*arguments: str) -> contextlib.AbstractContextManager[Any]:
        return running(sys.executable, "-m", "flashvl", *arguments, env=environment)

    with prometheus(f"http://{cluster.webui_url}", tmp_path / "prometheus") as url:
        with flashvl("train", str(recipe)) as job:
            wait_for(url, queries("training"), set(), job)
        caption = ("caption", str(images), "--output", str(tmp_path / "captions"))
        with (
            serving(*FULL, RAY_ADDRESS=cluster.address) as service,
            overloading(service.url),
            flashvl(*caption, "--max-error-rate=1", "--max-new-tokens=64") as job,
        ):
            fired = wait_for(url, queries("serving", "captioning"), PROVOKED, job)
    assert not fired & GROUNDLESS
