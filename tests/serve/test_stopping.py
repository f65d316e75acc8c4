"""A service's start, refused starts and end: real processes, and what remains of them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from flashvl.errors import ConfigError
from flashvl.serve.listening import reserved_port
from tests.support.cluster import free_ports, wait_until
from tests.support.images import encode, noise
from tests.support.serving import Service, ask, serving

PICTURE = encode(noise(0))
MARK = "FLASHVL_TEST_MARK"


def processes_with(mark: str) -> list[str]:
    """The processes of this machine that a command with the mark in its environment has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(" ".join(process.cmdline())[:80])
    return found


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "flashvl", "serve", *options]


@contextlib.contextmanager
def listener(host: str, port: int = 0) -> Iterator[int]:
    """A port on which another program listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as server:
        yield server.getsockname()[1]


def refused(tmp_path: Path, *options: str) -> str:
    """What a command says that must start nothing."""
    mark, ray = uuid.uuid4().hex, tmp_path / "ray"
    environment = os.environ | {MARK: mark, "RAY_TMPDIR": str(ray)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        command(*options), env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done
    assert processes_with(mark) == []
    assert not ray.exists()
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: cannot listen at ")
    return done.stderr


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0"),
        ("0.0.0.0", "localhost"),
        ("::1", "::1"),
    ],
)
def test_a_port_that_another_program_has(tmp_path: Path, theirs: str, ours: str) -> None:
    with listener(theirs) as port:
        said = refused(tmp_path, f"--host={ours}", f"--port={port}")
    assert "Address already in use" in said and str(port) in said and "--port" in said


def test_a_port_that_another_service_has(tmp_path: Path, service: Service) -> None:
    port = service.url.rpartition(":")[2]
    assert "Address already in use" in refused(tmp_path, f"--port={port}")
    assert "Address already in use" in refused(tmp_path, "--host=0.0.0.0", f"--port={port}")


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::1", "no-such-host.invalid"])
def test_an_address_that_is_not_this_machines(tmp_path: Path, host: str) -> None:
    assert host in refused(tmp_path, f"--host={host}")


def test_a_reserved_port_is_kept_from_all_but_who_may_share_it() -> None:
    with reserved_port("127.0.0.1", 0, is_held=True) as port:
        assert port > 0
        with pytest.raises(OSError, match="in use"), listener("127.0.0.1", port):
            pass
        with pytest.raises(ConfigError, match="in use"):
            with reserved_port("127.0.0.1", port, is_held=True):
                pass
        with socket.socket() as proxy:  # as Serve's does
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            proxy.bind(("127.0.0.1", port))
            proxy.listen()
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with reserved_port("127.0.0.1", port, is_held=False), listener("127.0.0.1", port):
        pass


def test_a_port_that_is_taken_after_all(ray_cluster: None) -> None:
    """The port is taken after our check and before Serve's proxy starts, or on another node."""
    from flashvl.serve.config import ServiceConfig
    from flashvl.serve.run import deployed

    with listener("127.0.0.1") as port, pytest.raises(ConfigError, match=f":{port}: another"):
        with deployed(ServiceConfig(), "127.0.0.1", port):
            pass


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.slow
def test_two_that_start_at_once_on_one_port(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    both = [
        subprocess.Popen(command(f"--port={port}"), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    wait_until(lambda: any(each.poll() is not None for each in both), 60)
    (loser,) = [each for each in both if each.poll() is not None]
    (winner,) = [each for each in both if each is not loser]
    assert loser.returncode == 2
    assert winner.stdout is not None and "answers at" in winner.stdout.readline()
    winner.terminate()
    assert winner.wait(60) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("starts_ray")
def test_any_free_port() -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command("--port=0", "--host=::1"),
        env=os.environ | {MARK: mark, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    try:
        assert url.startswith("http://[::1]:")
        assert requests.get(f"{url}/readyz", timeout=10).status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert_nothing_is_left(mark)


def assert_nothing_is_left(mark: str) -> None:
    wait_until(lambda: not processes_with(mark), 20)


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.parametrize(
    "seconds",
    [4.0, *(pytest.param(each / 4, marks=pytest.mark.slow) for each in range(2, 64, 3))],
)
def test_a_signal_while_it_starts(seconds: float) -> None:
    """Early in the imports, in `ray.init`, in Serve's own start, in the model's."""
    mark = uuid.uuid4().hex
    (port,) = free_ports(1)
    process = subprocess.Popen(
        command(f"--port={port}"),
        env=os.environ | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT if int(4 * seconds) % 2 else signal.SIGTERM)
    said, complained = process.communicate(timeout=30)
    # Until Python runs our code, a signal has its usual effect.
    is_early = seconds < 1.0 and process.returncode < 0
    assert process.returncode == 0 or is_early, complained
    assert "Traceback" not in complained or is_early
    assert_nothing_is_left(mark)


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What a client saw of a stream."""

    status: int
    text: str
    finish_reasons: list[str]
    is_done: bool
    errors: list[dict[str, Any]]


def stream(url: str, tokens: int, begun: threading.Event) -> Streamed:
    answer = post(url, tokens, stream=True)
    pieces, reasons, errors, is_done = [], [], [], False
    for line in answer.iter_lines():
        begun.set()
        if line == b"data: [DONE]":
            is_done = True
        elif line:
            event = json.loads(line.removeprefix(b"data: "))
            errors += [event["error"]] if "error" in event else []
            for choice in event.get("choices", []):
                pieces.append(choice["delta"].get("content", ""))
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return Streamed(
        status=answer.status_code,
        text="".join(pieces),
        finish_reasons=reasons,
        is_done=is_done,
        errors=errors,
    )


def post(url: str, tokens: int, session: Any = requests, **options: Any) -> requests.Response:
    body = {
        "model": "tiny",
        "messages": ask("Describe the image.", PICTURE),
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": 0,
    }
    return session.post(
        f"{url}/v1/chat/completions",
        json=body | options,
        timeout=120,
        stream=options.get("stream", False),
    )


def is_refused(response: requests.Response) -> bool:
    """Whether the service refused this because it stops."""
    if response.status_code != 503:
        return False
    error = response.json()["error"]
    assert error["code"] == "service_stopping" and error["type"] == "server_error"
    assert int(response.headers["Retry-After"]) > 0
    return True


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_what_is_under_way_ends_and_nothing_new_begins(number: int) -> None:
    mark = uuid.uuid4().hex
    lengths = (50, 300, 700)
    with serving("--dtype=float32", **{MARK: mark}) as service, ThreadPoolExecutor() as pool:
        url = service.url
        expected = {length: post(url, length).json() for length in lengths}
        with requests.Session() as kept_alive:
            assert kept_alive.get(f"{url}/readyz", timeout=10).status_code == 200
            begun = [threading.Event() for _ in lengths]
            streams: list[Future[Streamed]] = [
                pool.submit(stream, url, length, event)
                for length, event in zip(lengths, begun, strict=True)
            ]
            whole = pool.submit(post, url, 500)
            assert all(event.wait(60) for event in begun)
            if number == signal.SIGINT:  # Ctrl-C: Ray's processes get it too
                os.killpg(service.process.pid, number)
            else:
                service.process.send_signal(number)
            wait_until(lambda: is_refused(kept_alive.get(f"{url}/readyz", timeout=10)), 10)
            # At least one long answer must still be under way, or nothing is tested.
            assert not streams[-1].done()
            assert is_refused(post(url, 5, session=kept_alive))
            assert is_refused(post(url, 5, stream=True))
            assert is_refused(requests.get(f"{url}/v1/models", timeout=10))
            assert requests.get(f"{url}/healthz", timeout=10).status_code == 200
        for length, future in zip(lengths, streams, strict=True):
            seen = future.result(timeout=120)
            choice = expected[length]["choices"][0]
            assert (seen.status, seen.is_done, seen.errors) == (200, True, [])
            assert seen.finish_reasons == [choice["finish_reason"]] == ["length"]
            assert seen.text == choice["message"]["content"]
        assert whole.result(timeout=120).json()["usage"]["completion_tokens"] == 500
        assert service.process.wait(60) == 0
    assert_nothing_is_left(mark)


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.slow
@pytest.mark.parametrize("is_impatient", [False, True])
def test_what_does_not_end_in_time_is_told_so(is_impatient: bool) -> None:
    """The service also ends at once when somebody asks a second time."""
    mark = uuid.uuid4().hex
    grace = "--graceful-shutdown-timeout-s=" + ("600" if is_impatient else "1")
    with serving("--max-num-seqs=16", grace, **{MARK: mark}) as service:
        with ThreadPoolExecutor() as pool:
            begun = [threading.Event() for _ in range(12)]
            streams = [pool.submit(stream, service.url, 900, event) for event in begun]
            assert all(event.wait(60) for event in begun)
            service.process.terminate()
            if is_impatient:
                wait_until(lambda: is_refused(requests.get(f"{service.url}/readyz", timeout=9)), 10)
                service.process.terminate()
            assert service.process.wait(60) == 0
            seen = [future.result(timeout=60) for future in streams]
        assert {each.status for each in seen} == {200}
        cut = [each for each in seen if not each.is_done]
        assert cut  # on a machine that is busy some may have ended before
        for each in cut:
            assert each.finish_reasons == []
            assert [error["code"] for error in each.errors] == ["service_stopping"]
    assert_nothing_is_left(mark)
