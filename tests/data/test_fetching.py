"""Images by URL: which hosts and addresses they may be fetched from."""

import asyncio
import ipaddress
import random
import socket
import ssl
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvl.data import fetching
from flashvl.data.fetching import Fetcher, fetch_all, is_public
from flashvl.errors import DataError
from tests.support.https import https_server

PICTURE = random.Random(0).randbytes(20_000)
REMEDY = "allow it"


class Handler(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name, _, rest = self.path[1:].partition("/")
        if name == "redirect":
            self.send_response(302)
            self.send_header("Location", rest.replace("~", ":"))
            self.end_headers()
        elif name == "missing":
            self.send_error(404)
        elif name == "busy" and self.asked.count(self.path) <= int(rest):
            self.send_error(503)
        elif name == "slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, ssl.SSLContext]]:
    """An https server on this machine, and a context that trusts it."""
    with https_server(Handler, tmp_path_factory.mktemp("tls")) as (port, certificate):
        yield port, ssl.create_default_context(cafile=str(certificate))


@pytest.fixture
def local_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 127.0.0.1 count as public, as the only server of the tests is there."""
    monkeypatch.setattr(
        fetching, "is_public", lambda address: address == "127.0.0.1" or is_public(address)
    )


def fetch(
    server: tuple[int, ssl.SSLContext], url: str, *hosts: str, max_bytes: int = 10**6
) -> bytes:
    port, context = server
    fetcher = Fetcher(hosts or (f"localhost:{port}",), context, remedy=REMEDY)
    return asyncio.run(fetcher.fetch(url.format(port), max_bytes))


@pytest.mark.usefixtures("local_is_public")
def test_fetches_from_an_allowed_host_and_follows_it(server: tuple[int, ssl.SSLContext]) -> None:
    assert fetch(server, "https://localhost:{}/picture") == PICTURE
    assert fetch(server, "https://LOCALHOST:{}/redirect//picture") == PICTURE
    with pytest.raises(DataError, match="status 404"):
        fetch(server, "https://localhost:{}/missing")
    with pytest.raises(DataError, match="max_image_bytes=1000"):
        fetch(server, "https://localhost:{}/picture", max_bytes=1000)


@pytest.mark.usefixtures("local_is_public")
def test_many_are_fetched_at_once_and_asked_for_again_where_that_may_help(
    server: tuple[int, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PAUSES_S", (0.01, 0.01))
    port, context = server
    Handler.asked.clear()
    host = f"https://localhost:{port}"
    paths = ["picture", "busy/1", "busy/2", "busy/3", "missing", "picture"]
    found = fetch_all(
        [*(f"{host}/{path}" for path in paths), "https://evil.example/x"],
        Fetcher((f"localhost:{port}",), context, remedy=REMEDY),
        10**6,
    )
    assert [found.pop(f"{host}/{path}") for path in ("picture", "busy/1", "busy/2")] == 3 * [
        PICTURE
    ]
    assert [str(error).rpartition(";")[2] for error in found.values()] == [
        f"image URL '{host}/busy/3' answered with status 503",
        f"image URL '{host}/missing' answered with status 404",
        " allow it",
    ]
    asked = {path: Handler.asked.count(f"/{path}") for path in paths}
    assert asked == {"picture": 1, "busy/1": 2, "busy/2": 3, "busy/3": 3, "missing": 1}


@pytest.mark.usefixtures("local_is_public")
def test_gives_up_on_a_slow_host_and_on_a_ring_of_redirects(
    server: tuple[int, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "FETCH_TIMEOUT_S", 0.5)
    began_s = time.monotonic()
    with pytest.raises(DataError, match="did not answer within 0.5 s"):
        fetch(server, "https://localhost:{}/slow")
    assert time.monotonic() - began_s < 3
    monkeypatch.setattr(fetching, "FETCH_TIMEOUT_S", 10)
    with pytest.raises(DataError, match="more than 3 times"):
        fetch(server, "https://localhost:{}" + "/redirect/" * 5 + "x")


@pytest.mark.usefixtures("local_is_public")
@pytest.mark.parametrize(
    "target",
    [
        "https~//127.0.0.1/latest/meta-data",  # public here, but not allowed
        "https~//169.254.169.254/latest/meta-data",
        "http~//localhost/picture",
        "file~///etc/passwd",
        "//evil.example/picture",
    ],
)
def test_a_redirect_leads_nowhere_else(server: tuple[int, ssl.SSLContext], target: str) -> None:
    with pytest.raises(DataError, match="host|https://"):
        fetch(server, "https://localhost:{}/redirect/" + target)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:{}/picture",
        "https://evil.example/picture",
        "https://localhost:{}@evil.example/picture",
        "https://user:pass@localhost:{}/picture",
        "https://localhost:22/picture",
        "file:///etc/passwd",
        "ftp://localhost/picture",
        "https://[::1/",
        "https://",
        "//localhost:{}/picture",
        "",
    ],
)
def test_other_schemes_hosts_and_ports_are_refused_unasked(
    server: tuple[int, ssl.SSLContext], url: str
) -> None:
    Handler.asked.clear()
    with pytest.raises(DataError) as caught:
        fetch(server, url)
    assert "\n" not in str(caught.value)
    assert Handler.asked == []


def test_no_host_is_allowed_unless_one_is(server: tuple[int, ssl.SSLContext]) -> None:
    with pytest.raises(DataError, match="not fetched here; allow it"):
        asyncio.run(Fetcher((), remedy=REMEDY).fetch("https://localhost/picture", 1000))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "metadata.example"])
def test_an_allowed_name_with_a_private_address_is_not_connected_to(
    server: tuple[int, ssl.SSLContext], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address that is connected to is the one that is checked, even if DNS answers change."""
    port, _ = server
    resolve = socket.getaddrinfo

    def lie(name: str, *args: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if name == "metadata.example" else name, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lie)
    Handler.asked.clear()
    with pytest.raises(DataError, match="at a public address"):
        fetch(server, f"https://{host}:{port}/picture", f"{host}:{port}")
    assert Handler.asked == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),  # NAT64 of 127.0.0.1
        ("2002:7f00:1::", False),  # 6to4 of it
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(address) == expected


@given(st.integers(0, 2**32 - 1))
def test_an_address_in_an_address_is_as_public_as_it_is(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    expected = address.is_global and not address.is_multicast
    assert is_public(str(address)) == expected
    assert is_public(f"::ffff:{address}") == expected
