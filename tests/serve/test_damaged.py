"""Damaged image files: the service answers or refuses in one line, and continues to work."""

import pytest
import requests

from flashvl.data.images import decode_image
from flashvl.errors import DataError
from tests.support.damage import damaged_files, jpeg_damages, png_damages
from tests.support.images import data_url


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_answered_or_refused(url: str) -> None:
    for name, data in damaged_files(58, seed=3):
        form = {"max_tokens": "2"}
        answer = requests.post(f"{url}/v1/captions", files={"image": data}, data=form, timeout=60)
        try:
            decode_image(data)
        except DataError as error:
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["message"] == str(error), name
        else:
            assert answer.status_code == 200, (name, answer.text)


@pytest.mark.parametrize(
    ("media_type", "data"),
    [
        ("image/png", png_damages()["zTXt of 3 MiB"][1]),
        ("image/png", png_damages()["eXIf noise"][1]),
        ("image/jpeg", jpeg_damages()["ICC short"][1]),
        ("image/jpeg", jpeg_damages()["MPF noise"][1]),
    ],
)
def test_good_pixels_behind_bad_metadata_are_answered(
    url: str, media_type: str, data: bytes
) -> None:
    link = data_url(data, media_type)
    content = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": "What?"}]
    answer = requests.post(
        f"{url}/v1/chat/completions",
        json={
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 2,
        },
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
