"""Offline jobs through a running service: the same captions, and online requests come first."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
from ray.cluster_utils import Cluster

from flashvl.config import DEFAULT_PROMPT
from flashvl.data import synthetic
from flashvl.data.features import ask_about_image
from flashvl.data.images import decode_image
from flashvl.engine import Engine, Request
from tests.support.images import encode, noise
from tests.support.jobs import rows_of
from tests.support.serving import ask

NUM_ROWS = 120
STUCK = """
import asyncio, ctypes, os
import ray
from PIL import Image
from flashvl.batch.service import ServedEngine
from flashvl.config import DEFAULT_PROMPT
from flashvl.data.features import ask_about_image
from flashvl.engine import Request
from flashvl.model.loading import load_processor

async def main():
    engine = ServedEngine("flashvl", load_processor("tiny"))
    request = Request(
        messages=ask_about_image(DEFAULT_PROMPT), images=[Image.new("RGB", (300, 200))]
    )
    rows = [asyncio.create_task(engine.complete(request)) for _ in range(32)]
    await asyncio.wait(rows, return_when=asyncio.FIRST_COMPLETED)
    print("stuck", flush=True)
    ctypes.PyDLL(None).sleep(600)  # no other thread can run Python meanwhile

ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
asyncio.run(main())
"""
"""A job with rows under way that takes no answer any more."""


def caption(cluster: Cluster, *options: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "flashvl", "caption", *options]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_job_through_the_service(
    url: str, cluster: Cluster, engine: Engine, tmp_path: Path
) -> None:
    scenes = [encode(synthetic.sample("heldout", 1, index).image()) for index in range(20)]
    images = [b"no image" if row == 7 else scenes[row % 20] for row in range(NUM_ROWS)]
    prompts = ["why " * 25_000 if row == 9 else DEFAULT_PROMPT for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"image": images, "q": prompts}), tmp_path / "in.parquet")
    options = (str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"))
    options += ("--prompt-column=q", "--max-error-rate=0.05", "--dtype=float32")
    job = caption(cluster, *options, "--via-serve", "flashvl")
    waited = []
    question = {
        "model": "tiny",
        "messages": ask(DEFAULT_PROMPT, encode(noise(0))),
        "include_timing": True,
    }
    while job.poll() is None:  # online requests meanwhile
        answer = requests.post(f"{url}/v1/chat/completions", json=question, timeout=60)
        assert answer.status_code == 200, answer.text
        waited.append(answer.json()["timing"]["queue_ms"])
        time.sleep(0.05)
    assert job.returncode == 0, job.communicate()[1]

    rows = rows_of(tmp_path / "out")
    assert sorted(rows) == list(range(NUM_ROWS))
    expected = engine.generate(
        [
            Request(
                messages=ask_about_image(DEFAULT_PROMPT),
                images=[decode_image(scene)],
                max_new_tokens=64,
            )
            for scene in scenes
        ]
    )
    for row, answer in rows.items():
        if row == 7:
            assert answer["step"] == "decode"
        elif row == 9:
            assert answer["step"] == "caption" and "exceed max_model_len" in answer["reason"]
        else:
            assert answer["caption"] == expected[row % 20].text
    # A free slot was kept for each: it waited for a step, not for a caption.
    assert len(waited) > 10
    slowest = max(each.timing.last_token_s for each in expected)
    assert statistics.median(waited) < 1e3 * slowest


def test_a_service_that_will_not_do_is_refused(
    url: str, cluster: Cluster, engine: Engine, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"image": [encode(noise(0))]}), tmp_path / "in.parquet")
    options = (str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"), "--via-serve")
    jobs = [
        (caption(cluster, *options, "nothing"), "application 'nothing' is not there"),
        (caption(cluster, *options, "flashvl"), "another model or dtype"),
        (
            caption(cluster, *options, "flashvl", "--dtype=float32", "--model=tiny-iss"),
            "another model or dtype",
        ),
    ]
    for job, said in jobs:
        told = job.communicate(timeout=120)[1]
        assert job.returncode == 2 and said in told, told
    assert not (tmp_path / "out" / "captions").exists()


def test_a_job_that_hangs_does_not_hold_up_the_service(url: str, cluster: Cluster) -> None:
    question = {"model": "tiny", "messages": ask("Describe the image.", encode(noise(1)))}
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    line = [sys.executable, "-c", STUCK]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as job:
        try:
            assert job.stdout is not None and job.stdout.readline() == "stuck\n"
            for _ in range(5):
                answer = requests.post(f"{url}/v1/chat/completions", json=question, timeout=20)
                assert answer.status_code == 200, answer.text
            assert job.poll() is None
        finally:
            job.kill()
