"""Clients that leave, replicas that die, are replaced, and come and go with the load."""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from flashvl.engine.heartbeats import SILENCE_S
from flashvl.serve.scaling import POLICY
from tests.support.cluster import wait_until
from tests.support.images import encode, noise
from tests.support.serving import Deployment, ask, deploying, wait_until_idle

PICTURES = [encode(noise(seed)) for seed in range(8)]


def body(seed: int, max_tokens: int = 64, **options: Any) -> dict[str, Any]:
    """A request for an answer of exactly `max_tokens` tokens."""
    return {
        "model": "tiny",
        "messages": ask("Describe the image.", PICTURES[seed % len(PICTURES)]),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    } | options


@dataclass
class Outcome:
    """The ends of requests."""

    ends: Counter[str] = field(default_factory=Counter)
    """Numbers of requests by their end: done, refused (429), cut (a clean error event), or one that
    must not happen."""


async def stream(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> str:
    async with session.post(f"{url}/v1/chat/completions", json=request) as answer:
        if answer.status != 200:
            told = await answer.json()
            return (
                "refused" if answer.status == 429 else f"{answer.status} {told['error']['message']}"
            )
        last = ""
        async for line in answer.content:
            if line.startswith(b"data: "):
                last = line.removeprefix(b"data: ").strip().decode()
        if last == "[DONE]":
            return "done"
        return "cut" if "error" in json.loads(last) else f"ended with {last}"


async def under_load(
    url: str, num_clients: int, meanwhile: Callable[[], Awaitable[None]], **options: Any
) -> Outcome:
    """Clients that ask one request after the other until `meanwhile` has ended."""
    outcome, is_over = Outcome(), asyncio.Event()

    async def client(number: int) -> None:
        async with aiohttp.ClientSession() as session:
            while not is_over.is_set():
                try:
                    end = await stream(session, url, body(number, **options))
                except (aiohttp.ClientError, ValueError) as error:
                    end = f"{type(error).__name__}: {error}"
                outcome.ends[end] += 1

    clients = [asyncio.create_task(client(number)) for number in range(num_clients)]
    try:
        await meanwhile()
    finally:
        is_over.set()
        await asyncio.gather(*clients)
    return outcome


async def cut_off(url: str, num_requests: int, at_once: int) -> Counter[str]:
    """Send requests whose clients hang up at a random moment."""
    rng, ends = random.Random(0), Counter[str]()
    slots = asyncio.Semaphore(at_once)

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        request = body(number, max_tokens=200, stream=rng.random() < 0.7)
        async with slots:
            try:
                async with asyncio.timeout(rng.expovariate(1 / 0.15)):
                    ends[await stream(session, url, request)] += 1
            except (TimeoutError, json.JSONDecodeError):
                ends["left"] += 1

    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(one(session, number) for number in range(num_requests)))
    return ends


@pytest.mark.parametrize("num_requests", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_leave_leave_nothing(url: str, num_requests: int) -> None:
    ends = asyncio.run(cut_off(url, num_requests, at_once=24))
    assert ends["left"] > 0.5 * num_requests, ends
    assert set(ends) <= {"left", "done", "refused"}, ends
    wait_until_idle(url)


@pytest.fixture(scope="module")
def deployment(starts_ray: None) -> Iterator[Deployment]:
    with deploying() as deployment:
        yield deployment


def config(deployments: list[dict[str, Any]] | None = None, **args: Any) -> dict[str, Any]:
    return {
        "applications": [
            {
                "name": "flashvl",
                "route_prefix": "/",
                "import_path": "flashvl.serve.app:build_app",
                "args": {"model": "tiny", "max_num_seqs": 8, "max_waiting": 16} | args,
                "deployments": deployments or [],
            }
        ]
    }


@pytest.mark.slow
def test_a_replica_that_is_killed_fails_nobody_who_has_not_heard_from_it(
    deployment: Deployment,
) -> None:
    deployment.deploy(config(replicas="2"))
    wait_until(lambda: len(deployment.replicas()) == 2, 60)

    async def kill_three() -> None:
        for _ in range(3):
            await asyncio.sleep(10)
            before = deployment.replicas()
            os.kill(min(before.values()), signal.SIGKILL)
            await asyncio.sleep(5)
            await asyncio.to_thread(
                wait_until,
                lambda before=before: (
                    len(deployment.replicas()) == 2 and deployment.replicas() != before
                ),
                90,
            )

    outcome = asyncio.run(under_load(deployment.url, 8, kill_three))
    sys.stderr.write(f"{outcome}\n")
    assert outcome.ends["done"] > 50
    assert set(outcome.ends) <= {"done", "cut"}, outcome
    assert outcome.ends["cut"] <= 3 * 8


@pytest.mark.slow
def test_a_replica_that_falls_silent_keeps_nobody_waiting_who_has_not_heard_from_it(
    deployment: Deployment,
) -> None:
    """As on a host that is cut off: its connections stay open, and nothing comes."""
    deployment.deploy(config(replicas="2"))
    wait_until(lambda: len(deployment.replicas()) == 2, 60)
    silent = min(deployment.replicas().values())

    async def freeze() -> None:
        await asyncio.sleep(5)
        os.kill(silent, signal.SIGSTOP)
        await asyncio.sleep(2 * SILENCE_S)

    try:
        outcome = asyncio.run(under_load(deployment.url, 8, freeze))
    finally:
        os.kill(silent, signal.SIGCONT)
    sys.stderr.write(f"{outcome}\n")
    assert outcome.ends["done"] > 50
    assert set(outcome.ends) <= {"done", "cut"}, outcome
    assert outcome.ends["cut"] <= 8


@pytest.mark.slow
def test_a_rolling_update_fails_nobody(deployment: Deployment) -> None:
    deployment.deploy(config(replicas="2"))
    before = deployment.replicas()

    async def update() -> None:
        await asyncio.sleep(5)
        await asyncio.to_thread(deployment.deploy, config(replicas="2", max_waiting=17))
        await asyncio.sleep(5)

    outcome = asyncio.run(under_load(deployment.url, 8, update))
    sys.stderr.write(f"{outcome}\n")
    assert set(outcome.ends) == {"done"}, outcome
    assert not set(before) & set(deployment.replicas())


@pytest.mark.slow
def test_replicas_follow_the_load_and_nobody_notices(deployment: Deployment) -> None:
    scaling = {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 6,
        "metrics_interval_s": 1,
        "look_back_period_s": 5,
        "upscale_delay_s": 3,
        "downscale_delay_s": 10,
        "policy": {"policy_function": POLICY},
    }
    deployment.deploy(
        config(
            [{"name": "EngineReplica", "autoscaling_config": scaling}],
            replicas="1:3",
            max_waiting=64,
        )
    )
    wait_until(lambda: len(deployment.replicas()) == 1, 90)
    history: list[tuple[float, int]] = []

    def count() -> int:
        history.append((round(time.monotonic() - began_s, 1), len(deployment.replicas())))
        return history[-1][1]

    async def until(number: int, seconds: float) -> None:
        await asyncio.to_thread(wait_until, lambda: count() == number, seconds)

    async def step() -> None:
        await until(3, 120)
        await asyncio.sleep(10)

    began_s = time.monotonic()
    up = asyncio.run(under_load(deployment.url, 24, step))
    down = asyncio.run(under_load(deployment.url, 2, lambda: until(1, 180)))
    sys.stderr.write(f"{up} {down} {history}\n")
    assert set(up.ends) == {"done"}, up
    assert set(down.ends) == {"done"}, down
