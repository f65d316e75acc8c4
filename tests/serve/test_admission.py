"""Requests that are made to do harm, sent over the wire as a whole."""

import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from ray.cluster_utils import Cluster

from flashvl.errors import ConfigError
from flashvl.serve.admission import read_api_keys
from tests.support.images import data_url, encode, noise
from tests.support.serving import Service, ask, serving

PICTURE = encode(noise(0))


def chat(url: str, messages: Any, **options: Any) -> requests.Response:
    body = {"model": "tiny", "messages": messages} | options
    return requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def image_part(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def error_of(response: requests.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels, all black, in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    compress = zlib.compressobj(9)
    lines = b"".join(compress.compress(bytes(side + 1)) for _ in range(side)) + compress.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bomb(15_000), "max_image_pixels"),
        (PICTURE[: len(PICTURE) // 2], "image"),
        (b"", "empty"),
        (b"GIF89a", "image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known format"),
        (encode(noise(0, (1, 1))), "min_image_side"),
    ],
)
def test_bombs_and_broken_images_are_refused(url: str, data: bytes, said: str) -> None:
    before = psutil.virtual_memory().available
    refused = chat(url, image_part(data_url(data)))
    assert refused.status_code == 400 and said in error_of(refused)["message"]
    assert before - psutil.virtual_memory().available < 2**30


def test_more_than_is_allowed_is_refused(url: str) -> None:
    assert "max_images" in error_of(chat(url, ask("Hi", *[PICTURE] * 17)))["message"]
    many = chat(url, ask("Hi") * 300)
    assert many.status_code == 400 and error_of(many)["param"] == "messages"
    long = chat(url, ask("x" * 1_000_001))
    assert long.status_code == 400


def send(url: str, head: str, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Send raw HTTP; returns what comes back until the service hangs up or stops sending."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=40) as wire:
        wire.sendall(head.format(host=parts.netloc).replace("\n", "\r\n").encode())
        answer = b""
        for piece in pieces:
            wire.settimeout(10)
            try:
                wire.sendall(piece)
            except OSError:
                break
            time.sleep(pause_s)
            wire.settimeout(0.001)
            try:
                answer = wire.recv(65536)
                break
            except TimeoutError:
                continue
            except OSError:
                break
        wire.settimeout(40)
        while b"\r\n\r\n" not in answer or not answer.split(b"\r\n\r\n", 1)[1]:
            more = wire.recv(65536)
            if not more:
                break
            answer += more
    return answer


POST = "POST /v1/chat/completions HTTP/1.1\nHost: {host}\nContent-Type: application/json\n"


def test_a_body_of_500_mb_is_refused_before_it_is_there(url: str, cluster: Cluster) -> None:
    """With a Content-Length header, and without."""
    answer = send(url, POST.replace("{host}", "x") + "Content-Length: 524288000\n\n", b"{")
    assert b" 413 " in answer.split(b"\r\n")[0], answer[:200]
    used = memory(cluster)
    # As fast as a network of a gigabit a second: Serve's proxy continues to read while we refuse.
    piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    answer = send(url, POST + "Transfer-Encoding: chunked\n\n", *[piece] * 500, pause_s=0.008)
    assert b" 413 " in answer.split(b"\r\n")[0], answer[:200]
    assert memory(cluster) - used < 300 * 2**20


def memory(cluster: Cluster) -> int:
    """Bytes of memory of the processes that a body goes through: Serve's proxy and the ingress."""
    (node,) = cluster.list_all_nodes()
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return sum(
        child.memory_info().rss
        for child in raylet.children(recursive=True)
        if child.name().startswith(("ray::ProxyActor", "ray::SERVE_REPLICA", "ray::ServeReplica"))
    )


def test_numbers_that_are_none_are_refused_as_lengths(url: str) -> None:
    for length in ("-1", "1e3", "9" * 30, "²"):
        head = f"Content-Length: {length}\n\n"
        answer = send(url, POST.replace("{host}", "x") + head, b"{}")
        assert answer.split(b"\r\n")[0].split(b" ")[1] in (b"400", b"413"), (length, answer[:100])


def test_a_deep_json_is_refused(url: str) -> None:
    for body in ("[" * 100_000, '{"a":' * 100_000, "[" * 1000 + "]" * 1000, "{", "", "nan"):
        refused = requests.post(
            f"{url}/v1/chat/completions",
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
        assert refused.status_code == 400, body[:20]
        error_of(refused)


def test_unpaired_surrogates_and_nulls_are_no_trouble(url: str) -> None:
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "a\\ud800b\\u0000"}]}'
    answer = requests.post(
        f"{url}/v1/chat/completions",
        data=body,
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code in (200, 400), answer.text


def test_what_a_header_says_is_not_repeated(url: str) -> None:
    """An id that a client chooses cannot break out of its header either."""
    answer = requests.get(f"{url}/healthz", headers={"X-Request-ID": "abc-1"}, timeout=10)
    assert answer.headers["x-request-id"] == "abc-1"
    head = "GET /v1/models HTTP/1.1\nHost: {host}\nX-Request-ID: a\\r\\nSet-Cookie: b\n\n"
    raw = send(url, head, b"")
    assert b"\r\nset-cookie" not in raw.lower()


def test_cors_is_closed(url: str) -> None:
    answer = requests.options(
        f"{url}/v1/chat/completions",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        timeout=10,
    )
    assert "access-control-allow-origin" not in answer.headers


def test_it_listens_on_this_machine_only(service: Service) -> None:
    port = urlsplit(service.url).port
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


@pytest.fixture(scope="module")
def closed(starts_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with keys from a file and from the environment, and short timeouts."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first-key\n\nsecond-key\n")
    origin = "--cors-origin=https://ours.example"
    with serving(f"--api-keys-file={keys}", origin, FLASHVL_API_KEYS="third, fourth") as started:
        yield started


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
        ("Bearer third", 200),
        ("Bearer fourth", 200),
        ("Bearer first-ke", 401),
        ("Bearer first-keyy", 401),
        ("Bearer ", 401),
        ("first-key", 401),
        ("Basic first-key", 401),
        ("Bearer é", 401),
    ],
)
def test_keys(closed: Service, header: str | None, status: int) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = requests.get(f"{closed.url}/v1/models", headers=headers, timeout=10)
    assert answer.status_code == status
    if status == 401:
        assert error_of(answer)["code"] == "invalid_api_key"
        assert "first" not in answer.text
        body = requests.post(
            f"{closed.url}/v1/chat/completions", data=b"x" * 10**6, headers=headers, timeout=10
        )
        assert body.status_code == 401


def test_probes_and_the_page_need_no_key_and_a_slow_body_is_cut_off(closed: Service) -> None:
    for path in ("/healthz", "/readyz", "/", "/openapi.json"):
        assert requests.get(closed.url + path, timeout=10).status_code == 200
    answer = requests.options(
        f"{closed.url}/v1/models",
        headers={"Origin": "https://ours.example", "Access-Control-Request-Method": "GET"},
        timeout=10,
    )
    assert answer.headers["access-control-allow-origin"] == "https://ours.example"
    head = POST + "Authorization: Bearer third\nContent-Length: 1000\n\n"
    began_s = time.monotonic()
    answer = send(closed.url, head, *[b" "] * 60, pause_s=0.5)
    assert b" 408 " in answer.split(b"\r\n")[0], answer[:200]
    assert 15 < time.monotonic() - began_s < 27


def test_a_key_file_that_closes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_keys(str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(str(tmp_path / "empty"))
