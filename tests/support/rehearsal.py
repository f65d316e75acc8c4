"""A fleet on simulated hosts, run by the units of `cluster/systemd/`, as the runbook says."""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import requests
import yaml

from tests.support.cluster import wait_until
from tests.support.fleet.units import read_variables
from tests.support.hosts import Host, Network
from tests.support.images import encode, noise
from tests.support.serving import ask

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = ROOT / "cluster" / "systemd"
PROGRAMS = Path(sys.executable).parent
START_S = 180.0
HTTP_PORT = 8000


def read_environment(**changed: str) -> dict[str, str]:
    """The variables of `cluster/systemd/ray.env`; one that is changed to "" is left out."""
    values = read_variables(SYSTEMD / "ray.env")
    values |= {"RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]} | changed
    return {name: value for name, value in values.items() if value or name not in changed}


@dataclass(kw_only=True, slots=True)
class Fleet:
    """A head without CPUs, and workers."""

    network: Network
    environment: dict[str, str]
    head: Host = field(init=False)

    def __post_init__(self) -> None:
        self.head = self.network.add_host()
        self.environment["FLASHVL_HEAD"] = f"{self.head.address}:6379"

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:8265"

    def start_head(self) -> None:
        """Have the head's unit run; the head may be a while in coming up."""
        options = f"--object-store-memory=80000000 {self.environment['RAY_START_OPTIONS']}"
        environment = self.environment | {"RAY_START_OPTIONS": options}
        self.head.start_unit(SYSTEMD / "ray-head.service", environment, PROGRAMS)

    def add_worker(self, num_cpus: int) -> Host:
        """Have a worker's unit run on a new host."""
        host = self.network.add_host()
        options = f"--num-cpus={num_cpus} --object-store-memory=80000000"
        environment = self.environment | {"RAY_START_OPTIONS": options}
        host.start_unit(SYSTEMD / "ray-worker.service", environment, PROGRAMS)
        return host

    def get(self, path: str, timeout_s: float = 60.0) -> Any:
        """What the dashboard answers to a request with the token."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        answer = requests.get(f"{self.dashboard}{path}", headers=headers, timeout=timeout_s)
        answer.raise_for_status()
        return answer.json()

    def addresses(self) -> set[str]:
        """The addresses of the hosts that the head counts as alive; none while there is no head."""
        try:
            told = self.get("/nodes?view=summary", timeout_s=5)["data"]["summary"]
        except requests.RequestException:
            return set()
        alive = [node for node in told if node["raylet"].get("state") == "ALIVE"]
        return {node["ip"] for node in alive if "ip" in node}  # a new one has not told its own yet

    def wait_for(self, *hosts: Host) -> None:
        wanted = {self.head.address} | {host.address for host in hosts}
        wait_until(lambda: wanted <= self.addresses(), START_S)

    def run(self, *line: str) -> None:
        """Run a program of our environment outside the fleet, as a user does."""
        addresses = dict.fromkeys(("RAY_ADDRESS", "RAY_DASHBOARD_ADDRESS"), self.dashboard)
        done = subprocess.run(
            [PROGRAMS / line[0], *line[1:]],
            env=os.environ | addresses,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    def submit(self, name: str, *line: str) -> None:
        """Submit a job whose driver runs on a worker."""
        options = ["--no-wait", "--submission-id", name, "--entrypoint-num-cpus", "1"]
        self.run("ray", "job", "submit", *options, "--working-dir", str(ROOT), "--", *line)

    def job(self, name: str) -> dict[str, Any]:
        told: dict[str, Any] = self.get(f"/api/jobs/{name}")
        return told

    def log(self, name: str) -> str:
        """What a job has printed so far."""
        told: str = self.get(f"/api/jobs/{name}/logs")["logs"]
        return told

    def wait_for_job(self, name: str, seconds: float) -> None:
        """Wait until the job has succeeded."""

        def has_ended() -> bool:
            return self.job(name)["status"] in ("SUCCEEDED", "FAILED", "STOPPED")

        wait_until(has_ended, seconds)
        assert self.job(name)["status"] == "SUCCEEDED", self.log(name)[-5000:]

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Deploy a file as those in `serve_configs/`, and wait until it runs as it says."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(dict(config), file)
            file.flush()
            self.run("serve", "deploy", file.name)
        wait_until(lambda: self.service()["status"] == "RUNNING", START_S)

    def service(self) -> dict[str, Any]:
        """Serve's own description of the application; its status is "" while there is no head."""
        try:
            applications = self.get("/api/serve/applications/", timeout_s=5)["applications"]
        except requests.RequestException:
            return {"status": ""}
        found: dict[str, Any] = applications.get("flashvl", {"status": ""})
        return found


@contextlib.contextmanager
def logs_shown(network: Network) -> Iterator[None]:
    """Print the ends of the units' logs if something fails."""
    try:
        yield
    except BaseException:
        for log in sorted(network.folder.glob("h*/ray-*.log")):
            sys.stderr.write(f"--- {log.parent.name}/{log.name}\n{log.read_text()[-1500:]}\n")
        raise


@dataclass(kw_only=True)
class Clients:
    """What came of requests that were sent at fixed times, whether or not others were answered."""

    ends: Counter[str] = field(default_factory=Counter)
    """Numbers of requests by their end, as `_end_of` names it, or by their error."""
    seconds: list[float] = field(default_factory=list)
    """Seconds until each answer was complete."""

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share))


@contextlib.contextmanager
def clients(
    hosts: list[Host], rate_per_s: float, api_key: str = "", **options: Any
) -> Iterator[Clients]:
    """Ask the proxies of these hosts, `rate_per_s` requests a second each, while the body runs.

    Args:
        options: fields of the request, besides a question about a picture.
    """
    told, is_over = Clients(), threading.Event()
    body = {"model": "tiny", "messages": ask("Describe the image.", encode(noise(0)))}
    body |= {"max_tokens": 16} | options

    async def one(session: aiohttp.ClientSession, host: Host) -> None:
        url = f"http://{host.address}:{HTTP_PORT}/v1/chat/completions"
        began_s = time.monotonic()
        try:
            async with session.post(url, json=body) as answer:
                told.ends[await _end_of(answer)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            told.ends[f"{type(error).__name__}: {error}"] += 1
        told.seconds.append(time.monotonic() - began_s)

    async def all_of_them() -> None:
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=120)
        headers = {"Authorization": f"Bearer {api_key}"}
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session,
            asyncio.TaskGroup() as group,
        ):
            while not is_over.is_set():
                for host in hosts:
                    group.create_task(one(session, host))
                await asyncio.sleep(1 / rate_per_s)

    thread = threading.Thread(target=asyncio.run, args=(all_of_them(),))
    thread.start()
    try:
        yield told
    finally:
        is_over.set()
        thread.join()


async def _end_of(answer: aiohttp.ClientResponse) -> str:
    """ "done"; "cut", for a stream that ended with an error; or what went wrong."""
    text = await answer.text()
    if answer.status != 200:
        return f"{answer.status} {text}"
    if answer.content_type != "text/event-stream" or text.endswith("data: [DONE]\n\n"):
        return "done"
    return "cut" if '"error"' in text.splitlines()[-2] else f"ended with {text[-200:]}"
