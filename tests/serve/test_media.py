"""Images by data URL."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvl.errors import DataError
from flashvl.serve.media import decode_data_url
from tests.serve.conftest import data_url


@given(st.binary(min_size=1, max_size=300))
def test_data_urls(data: bytes) -> None:
    assert decode_data_url(data_url(data), 300) == (data, "image/png")
    assert decode_data_url(data_url(data, "image/jpg"), 300) == (data, "image/jpeg")
    assert decode_data_url(data_url(data, ""), 300) == (data, None)
    if len(data) > 6:
        with pytest.raises(DataError, match="max_image_bytes"):
            decode_data_url(data_url(data), len(data) - 6)


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:", "data:image/png;base64,a", "data:image/png;base64,@@@@"]
)
def test_bad_data_urls(url: str) -> None:
    with pytest.raises(DataError):
        decode_data_url(url, 1000)
