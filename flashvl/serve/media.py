"""URLs in requests -> encoded images, without being led anywhere that a client must not reach."""

import asyncio
import ipaddress
import re
import socket
import ssl
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp

from flashvl.errors import DataError
from flashvl.serve.protocol import decode_base64

DATA_URL = re.compile(r"data:(?P<media_type>[\w.+-]+/[\w.+-]+)?(;[\w-]+=[^;,]*)*;base64,")
MAX_REDIRECTS = 3
FETCH_TIMEOUT_S = 10.0
"""For one image, redirects and all."""
ALIASES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-ms-bmp": "image/bmp"}


def decode_data_url(url: str, max_bytes: int) -> tuple[bytes, str | None]:
    """The bytes in a data URL, and the media type that it gives them.

    Raises:
        DataError: it is none of base64, or too long.
    """
    head = DATA_URL.match(url)
    if head is None:
        raise DataError(
            f"URL {url[:40]!r} is no data URL of base64; write data:image/jpeg;base64,..."
        )
    if (len(url) - head.end()) * 3 // 4 > max_bytes + 2:
        raise DataError(f"image has more than max_image_bytes={max_bytes}; compress it")
    media_type = head["media_type"]
    try:
        data = decode_base64(url[head.end() :])
    except ValueError as error:
        raise DataError(f"data URL is not valid base64 ({error}); encode it anew") from None
    return data, ALIASES.get(media_type, media_type) if media_type else None


class Fetcher:
    """Fetches images by https from some hosts only, and from public addresses only.

    The address is checked where a socket is made for it, so that neither a redirect nor a name that
    resolves otherwise the second time leads elsewhere.
    """

    def __init__(self, hosts: tuple[str, ...], ssl_context: ssl.SSLContext | None = None):
        self.hosts = frozenset(host.lower() for host in hosts)
        self.ssl_context = ssl_context or ssl.create_default_context()

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
            raise DataError(
                f"image URL {_shown(url)} did not answer within {FETCH_TIMEOUT_S:g} s"
            ) from None
        except (aiohttp.ClientError, OSError):
            # Nothing of what was found there: it would tell what listens where.
            raise DataError(
                f"image URL {_shown(url)} cannot be fetched: its host must answer by https, and at"
                " a public address"
            ) from None

    def check(self, url: str) -> None:
        """
        Raises:
            DataError: not https, or not of an allowed host.
        """
        if not self.hosts:
            raise DataError(
                "image URLs are not fetched by this service; send the image as a data URL"
            )
        try:
            parts = urlsplit(url)
        except ValueError:
            raise DataError(f"image URL {_shown(url)} is no URL") from None
        if parts.scheme != "https":
            raise DataError(f"image URL {_shown(url)} must begin with https:// or data:")
        if parts.netloc.lower().removesuffix(":443") not in self.hosts:
            raise DataError(
                f"image URL's host {parts.netloc[:100]!r} is not one that this service fetches"
                " from; send the image as a data URL"
            )


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
        raise DataError(f"image URL {_shown(url)} answered with status {response.status}")
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
