"""Data URLs in requests -> encoded images."""

import re

from flashvl.errors import DataError
from flashvl.serve.protocol import decode_base64

DATA_URL = re.compile(r"data:(?P<media_type>[\w.+-]+/[\w.+-]+)?(;[\w-]+=[^;,]*)*;base64,")
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
