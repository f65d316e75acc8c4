"""A service that is full: every request is refused alike, whatever its shape."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.support.cluster import wait_until
from tests.support.images import encode, noise
from tests.support.serving import Service, ask, serving, wait_until_idle

PICTURE = encode(noise(0))
LONG = {"ignore_eos": True, "max_tokens": 900}
BUSY = {"ignore_eos": True, "max_tokens": 50}


@pytest.fixture(scope="module")
def small(starts_ray: None) -> Iterator[Service]:
    """A service with one slot and one place in its queue."""
    with serving("--max-num-seqs=1", "--max-waiting=1") as started:
        yield started


def chat(**options: Any) -> dict[str, Any]:
    return {"json": {"model": "tiny", "messages": ask("Hi", PICTURE)} | options}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat/completions", chat()),
    "streamed": ("chat/completions", chat(stream=True)),
    "several": ("chat/completions", chat(n=3, **BUSY)),
    "several, streamed": ("chat/completions", chat(n=3, stream=True, **BUSY)),
    "caption": ("captions", {"files": {"image": PICTURE}}),
    "completion": ("completions", {"json": {"model": "tiny", "prompt": "Hi"}}),
    "completions": (
        "completions",
        {"json": {"model": "tiny", "prompt": ["a", "b"], "n": 2} | BUSY},
    ),
    "completions, streamed": (
        "completions",
        {"json": {"model": "tiny", "prompt": ["a", "b"], "n": 2, "stream": True} | BUSY},
    ),
    "response": ("responses", {"json": {"model": "tiny", "input": "Hi"}}),
    "response, streamed": ("responses", {"json": {"model": "tiny", "input": "Hi", "stream": True}}),
}


def post(url: str, shape: str) -> requests.Response:
    path, options = SHAPES[shape]
    return requests.post(f"{url}/v1/{path}", timeout=60, **options)


def check_refusal(answer: requests.Response) -> None:
    assert answer.status_code == 429, answer.text
    assert int(answer.headers["Retry-After"]) >= 1
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


def test_every_shape_is_refused_alike(small: Service) -> None:
    def begin() -> requests.Response:
        path, url = "chat/completions", small.url
        return requests.post(
            f"{url}/v1/{path}", stream=True, timeout=60, **chat(stream=True, **LONG)
        )

    def is_full() -> bool:
        load = requests.get(f"{small.url}/readyz", timeout=10).json()
        return (load["running"], load["waiting"]) == (1, 1)

    with ThreadPoolExecutor(2) as pool:  # one begins, the other waits for its slot
        others = [pool.submit(begin) for _ in range(2)]
        wait_until(is_full, 30)
        for shape in SHAPES:
            check_refusal(post(small.url, shape))
        for other in others:
            other.result().close()
    wait_until_idle(small.url)


@pytest.mark.parametrize("shape", ["several", "several, streamed", "completions, streamed"])
def test_more_answers_than_have_room_are_refused_as_one(small: Service, shape: str) -> None:
    """Each answer of a request is refused or not at its own time; the slots become free."""
    for _ in range(5):
        check_refusal(post(small.url, shape))
    wait_until_idle(small.url)


def test_a_burst_of_all_shapes_is_answered_or_refused(small: Service) -> None:
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda shape: post(small.url, shape), [*SHAPES] * 6))
    for answer in answers:
        if answer.status_code != 200:
            check_refusal(answer)
    assert {answer.status_code for answer in answers} == {200, 429}
    wait_until_idle(small.url)
