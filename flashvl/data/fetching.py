"""Image URLs -> encoded images, fetched from allowed hosts at public addresses only."""

import asyncio
import base64
import ipaddress
import random
import re
import socket
import ssl
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import aiohttp

from flashvl.errors import DataError, one_line

DATA_URL_HEAD = re.compile(
    r"""data: (?: (?: [^,"] | "[^"]*" )*? (?: ; | %3b ) )? \s* base64 \s*
        (?: (?: ; | %3b ) [^,]*? )? (?: , | %2c )""",
    re.IGNORECASE | re.VERBOSE,
)
MAX_HEAD = 2000
"""Characters that a data URL may have before its data."""
URL_SAFE = str.maketrans("-_", "+/")
MAX_REDIRECTS = 3
FETCH_TIMEOUT_S = 10.0
"""Seconds in which one image must arrive, redirects included."""
MAX_AT_ONCE = 16
"""Images that `fetch_all` fetches at once, since most of the time is spent waiting."""
PAUSES_S = (1.0, 4.0)
"""Seconds between attempts to fetch an image whose host may answer later; jittered."""


def is_data_url(url: str) -> bool:
    return url.lstrip()[:5].lower() == "data:"


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes in a data URL, however it is spelt.

    The head may have upper case, parameters and escapes; the data may have line breaks, spaces,
    escapes, the URL-safe alphabet, and no padding. The media type is ignored: the bytes tell what
    they are.

    Raises:
        DataError: the URL is not a data URL in base64, or its data is too long.
    """
    url = url.lstrip()
    head = DATA_URL_HEAD.match(url, 0, MAX_HEAD)
    if head is None:
        raise DataError(
            f"URL {url[:40]!r} is not a data URL in base64; write data:image/jpeg;base64,..."
        )
    try:
        text = url[head.end() :]
        if "%" in text:
            text = unquote_to_bytes(text).decode("ascii")
        text = "".join(text.split()).translate(URL_SAFE).rstrip("=")
        if len(text) * 3 // 4 > max_bytes:
            raise DataError(f"image has more than max_image_bytes={max_bytes}; compress it")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        reason = one_line(error, 100)
        raise DataError(f"data URL is not valid base64 ({reason}); encode it anew") from None


class UnavailableError(DataError):
    """The host does not answer now but may later: a timeout, a lost connection, a 429, a 5xx."""


class Fetcher:
    """Fetches images by https from allowed hosts only, and from public addresses only.

    The address is checked when its socket is made, so that neither a redirect nor a host name that
    resolves to another address the second time leads elsewhere.
    """

    def __init__(
        self, hosts: tuple[str, ...], ssl_context: ssl.SSLContext | None = None, *, remedy: str
    ):
        """
        Args:
            hosts: host names, or `name:port`, that images may be fetched from.
            remedy: end of the error about a host that is not allowed: what the user can do.
        """
        self.hosts = frozenset(host.lower() for host in hosts)
        self.ssl_context = ssl_context or ssl.create_default_context()
        self.remedy = remedy

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """The bytes that `url` leads to.

        Raises:
            DataError: the URL is not allowed, does not answer in time, or gives too many bytes.
        """
        connector = aiohttp.TCPConnector(ssl=self.ssl_context, socket_factory=_public_socket)
        try:
            async with (
                asyncio.timeout(FETCH_TIMEOUT_S),
                # Without the proxies, cookies and credentials of this process.
                aiohttp.ClientSession(
                    connector=connector, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
                ) as session,
            ):
                for _ in range(MAX_REDIRECTS + 1):
                    self.check(url)
                    async with session.get(url, allow_redirects=False) as response:
                        if response.status not in (301, 302, 303, 307, 308):
                            return await _read(response, url, max_bytes)
                        url = urljoin(url, response.headers.get("Location", ""))
                raise DataError(f"image URL redirects more than {MAX_REDIRECTS} times")
        except TimeoutError:
            raise UnavailableError(
                f"image URL {_shown(url)} did not answer within {FETCH_TIMEOUT_S:g} s"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            never = isinstance(error, ValueError) or isinstance(
                getattr(error, "os_error", None), PermissionError
            )
            # The message says nothing of what was found there, which would reveal what listens.
            raise (DataError if never else UnavailableError)(
                f"image URL {_shown(url)} cannot be fetched: its host must answer by https, and at"
                " a public address"
            ) from None

    def check(self, url: str) -> None:
        """Refuse a URL that may not be fetched.

        Raises:
            DataError: the URL does not use https, or its host is not allowed.
        """
        if not self.hosts:
            raise DataError(f"image URLs are not fetched here; {self.remedy}")
        try:
            parts = urlsplit(url)
        except ValueError:
            raise DataError(f"image URL {_shown(url)} is not a valid URL; correct it") from None
        if parts.scheme != "https":
            raise DataError(f"image URL {_shown(url)} must begin with https:// or data:")
        if parts.netloc.lower().removesuffix(":443") not in self.hosts:
            raise DataError(
                f"image URL's host {parts.netloc[:100]!r} is not allowed here; {self.remedy}"
            )


def is_web_url(text: str) -> bool:
    """Whether `text` is a URL of http or https."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def fetch_all(
    urls: Iterable[str], fetcher: Fetcher, max_bytes: int
) -> dict[str, bytes | DataError]:
    """The image of each URL, or the error that prevented it; `MAX_AT_ONCE` at a time."""
    return asyncio.run(_fetch_all(list(dict.fromkeys(urls)), fetcher, max_bytes))


async def _fetch_all(
    urls: list[str], fetcher: Fetcher, max_bytes: int
) -> dict[str, bytes | DataError]:
    at_once = asyncio.Semaphore(MAX_AT_ONCE)

    async def fetch(url: str) -> bytes | DataError:
        async with at_once:
            try:
                return await _fetch_patiently(url, fetcher, max_bytes)
            except DataError as error:
                return error

    return dict(zip(urls, await asyncio.gather(*map(fetch, urls)), strict=True))


async def _fetch_patiently(url: str, fetcher: Fetcher, max_bytes: int) -> bytes:
    for pause_s in PAUSES_S:
        try:
            return await fetcher.fetch(url, max_bytes)
        except UnavailableError:
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)
    return await fetcher.fetch(url, max_bytes)


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from everywhere, not only from this machine or network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket factory for aiohttp, which calls it with the very address that it connects to."""
    family, kind, protocol, _, address = info
    if not is_public(address[0]):
        raise PermissionError(f"{address[0]} is a private address")
    return socket.socket(family, kind, protocol)


async def _read(response: aiohttp.ClientResponse, url: str, max_bytes: int) -> bytes:
    if response.status != 200:
        may_pass = response.status in (408, 429) or response.status >= 500
        raise (UnavailableError if may_pass else DataError)(
            f"image URL {_shown(url)} answered with status {response.status}"
        )
    data = bytearray()
    async for piece in response.content.iter_chunked(2**16):
        data += piece
        if len(data) > max_bytes:
            raise DataError(
                f"image at {_shown(url)} has more than max_image_bytes={max_bytes}; compress it"
            )
    return bytes(data)


def _shown(url: str) -> str:
    """A URL for an error's line, without its query, which may hold a secret."""
    return repr(url.split("?", 1)[0][:100])
