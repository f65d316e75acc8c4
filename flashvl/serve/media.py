"""Data URLs in requests -> encoded images."""

import re
from urllib.parse import unquote_to_bytes

from flashvl.errors import DataError
from flashvl.serve.protocol import decode_base64

DATA_URL_HEAD = re.compile(
    r"""data: (?: (?: [^,"] | "[^"]*" )*? (?: ; | %3b ) )? \s* base64 \s*
        (?: (?: ; | %3b ) [^,]*? )? (?: , | %2c )""",
    re.IGNORECASE | re.VERBOSE,
)
MAX_HEAD = 2000
"""Characters of a data URL before its data."""
URL_SAFE = str.maketrans("-_", "+/")


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
        return decode_base64(text + "=" * (-len(text) % 4))
    except ValueError as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"data URL is not valid base64 ({reason}); encode it anew") from None
