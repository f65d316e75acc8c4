"""Images by data URL, however it is spelt."""

import base64
import contextlib
import re
import string
from urllib.parse import quote

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from flashvl.data.fetching import decode_data_url, is_data_url
from flashvl.errors import DataError
from tests.support.images import base64_of, data_url, encode, noise

PICTURE = encode(noise(0))
HEADS = st.sampled_from(
    [
        "data:image/png;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "Data:Image/Jpeg;Base64,",
        " data:image/png;base64,",
        "data: image/png; base64, ",
        "data:image/png ;base64 ,",
        "data:;base64,",
        "data:base64,",
        "data:image/*;base64,",
        "data:*/*;base64,",
        "data:application/octet-stream;base64,",
        "data:text/plain;charset=utf-8;base64,",
        "data:image/png;charset=US-ASCII;name=a%2Cb.png;base64,",
        'data:image/png;name="a, b;c.png";base64,',
        "data:image/png;base64;charset=utf-8,",
        "data:image%2Fpng%3Bbase64%2C",
        "data:image/svg+xml;base64,",
        "data:image/jpg;base64,",
        "data:png;base64,",
    ]
)


@st.composite
def dressed(draw: st.DrawFn, data: bytes) -> str:
    """A data URL as some program or person writes it."""
    text = base64_of(data)
    if draw(st.booleans()):
        text = text.translate(str.maketrans("+/", "-_"))
    if draw(st.booleans()):
        text = text.rstrip("=")
    escaped = draw(st.sampled_from(["", "=", "+/=", string.printable]))
    text = "".join(f"%{ord(c):02X}" if c in escaped else c for c in text)
    if draw(st.booleans()):
        text = text.replace("%3D", "%3d").replace("%2B", "%2b").replace("%2F", "%2f")
    width = draw(st.sampled_from([1, 3, 64, 76, 10**6]))
    gap = draw(st.sampled_from(["\n", "\r\n", " ", "\t", "%0A", "%0D%0A", "%20", " \n  "]))
    pieces = re.findall(rf"(?:%..|.){{1,{width}}}", text)
    return draw(HEADS) + gap.join(pieces) + draw(st.sampled_from(["", "\n", " ", "%0A"]))


@given(st.data(), st.binary(max_size=300))
def test_data_urls_however_they_are_spelt(data: st.DataObject, content: bytes) -> None:
    url = data.draw(dressed(content))
    assert is_data_url(url)
    assert decode_data_url(url, len(content)) == content
    if content:
        with pytest.raises(DataError, match="max_image_bytes"):
            decode_data_url(url, len(content) - 1)


NOT_BASE64 = "is not a data URL in base64"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>", NOT_BASE64),
        ("data:image/svg+xml;utf8,<svg a=';base64,'/>", NOT_BASE64),
        ("data:image/svg+xml,%3Csvg%20a=';base64,'", NOT_BASE64),
        ("data:image/png,abc", NOT_BASE64),
        ("data:", NOT_BASE64),
        ("data:image/png;base64", NOT_BASE64),
        ("data:image/png;name=" + "x" * 3000 + ";base64,YWJj", NOT_BASE64),
        ("data:image/png;base64,a", "not valid base64"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,YW=Jj", "not valid base64"),
        ("data:image/png;base64,YWJj%", "not valid base64"),
        ("data:image/png;base64,%FF%FE", "not valid base64"),
        ("data:image/png;base64,YWJj\ud800", "not valid base64"),
        ("data:image/png;base64,YWJj%\ud800", "not valid base64"),
        ("data:image/png;base64,YWJj\u00e9", "not valid base64"),
        ("data:image/png;base64,data:image/png;base64,YWJj", "not valid base64"),
    ],
)
def test_bad_data_urls(url: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as refusal:
        decode_data_url(url, 1000)
    assert "\n" not in str(refusal.value)


@given(st.one_of(st.text(), st.text('%0aAF=+/-_ \n,;"base64'), st.binary().map(repr)))
def test_garbage_is_a_data_error_at_most(rest: str) -> None:
    for head in ("data:", "data:image/png;base64,", 'data:";'):
        with contextlib.suppress(DataError):
            decode_data_url(head + rest, 1000)


def test_what_counts_is_what_the_bytes_are(url: str) -> None:
    """Over the wire: with a wrong label, line breaks or another alphabet; and not base64 at all."""
    lines = base64.encodebytes(PICTURE).decode()
    safe = base64.urlsafe_b64encode(PICTURE).decode().rstrip("=")
    spellings = [
        data_url(PICTURE),
        data_url(PICTURE, "image/jpeg"),
        data_url(PICTURE, "image/*"),
        data_url(PICTURE, "application/octet-stream"),
        data_url(PICTURE, ""),
        f"DATA:IMAGE/JPEG;BASE64,{lines}",
        f"data:image/webp;name=x.webp;base64,{safe}",
        f"data:image/png;base64,{quote(lines, safe='')}",
    ]
    answers = {
        told(url, spelling).json()["choices"][0]["message"]["content"] for spelling in spellings
    }
    assert len(answers) == 1
    refused = told(url, "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert NOT_BASE64 in error["message"]
    assert error["param"] == "messages.0.content.0.image_url.url"


def told(url: str, image: str) -> requests.Response:
    parts = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "Describe the image."},
    ]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    return requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
