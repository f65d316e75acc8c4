"""Image URLs -> encoded images, without being led anywhere that nobody allowed."""

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
"""Characters of a data URL before its data."""
URL_SAFE = str.maketrans("-_", "+/")
MAX_REDIRECTS = 3
FETCH_TIMEOUT_S = 10.0
"""For one image, redirects and all."""
MAX_AT_ONCE = 16
"""Images that `fetch_all` fetches at once: a host's answer is mostly waited for."""
PAUSES_S = (1.0, 4.0)
"""Before an image is asked for again, where that may help; jittered."""


def is_data_url(url: str) -> bool:
    return url.lstrip()[:5].lower() == "data:"


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes in a data URL, however it is spelt.

    Taken are upper case, parameters and escapes before the data; and in it line breaks and spaces,
    escapes, the alphabet for URLs, and an end without padding. What type it names does not count:
    the bytes tell what they are.

    Raises:
        DataError: it is none of base64, or too long.
    """
    url = url.lstrip()
    head = DATA_URL_HEAD.match(url, 0, MAX_HEAD)
    if head is None:
        raise DataError(
            f"URL {url[:40]!r} is no data URL of base64; write data:image/jpeg;base64,..."
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
    """The host does not answer now, and may later: a timeout, a lost connection, a 429, a 5xx."""


class Fetcher:
    """Fetches images by https from some hosts only, and from public addresses only.

    The address is checked where a socket is made for it, so that neither a redirect nor a name that
    resolves otherwise the second time leads elsewhere.
    """

    def __init__(
        self, hosts: tuple[str, ...], ssl_context: ssl.SSLContext | None = None, *, remedy: str
    ):
        """
        Args:
            remedy: what is to be done about a host that is not allowed.
        """
        self.hosts = frozenset(host.lower() for host in hosts)
        self.ssl_context = ssl_context or ssl.create_default_context()
        self.remedy = remedy

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """
        Raises:
            DataError: the URL is not allowed, does not answer in time, or is too long.
        """
        connector = aiohttp.TCPConnector(ssl=self.ssl_context, socket_factory=_public_socket)
        try:
            async with (
                asyncio.timeout(FETCH_TIMEOUT_S),
                # No proxies, cookies or credentials of ours.
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
            # Nothing of what was found there: it would tell what listens where.
            raise (DataError if never else UnavailableError)(
                f"image URL {_shown(url)} cannot be fetched: its host must answer by https, and at"
                " a public address"
            ) from None

    def check(self, url: str) -> None:
        """
        Raises:
            DataError: not https, or not of an allowed host.
        """
        if not self.hosts:
            raise DataError(f"image URLs are not fetched here; {self.remedy}")
        try:
            parts = urlsplit(url)
        except ValueError:
            raise DataError(f"image URL {_shown(url)} is no URL") from None
        if parts.scheme != "https":
            raise DataError(f"image URL {_shown(url)} must begin with https:// or data:")
        if parts.netloc.lower().removesuffix(":443") not in self.hosts:
            raise DataError(
                f"image URL's host {parts.netloc[:100]!r} is not one that is fetched from here;"
                f" {self.remedy}"
            )


def is_web_url(text: str) -> bool:
    """It is to be fetched over HTTP, if at all."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def fetch_all(
    urls: Iterable[str], fetcher: Fetcher, max_bytes: int
) -> dict[str, bytes | DataError]:
    """The image of each URL, or why there is none; some at once, and again where that may help."""
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
    """Reachable by anyone, and so nothing that this machine alone should be asked for."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """aiohttp's factory: called for the very address that is connected to."""
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
    """Without the query, which may hold a secret."""
    return repr(url.split("?", 1)[0][:100])
