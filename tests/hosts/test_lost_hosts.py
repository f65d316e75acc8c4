"""Hosts are cut off and lost under a training stage and a captioning job, which end right."""

import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flashvl.config import DEFAULT_PROMPT
from flashvl.data import synthetic
from flashvl.data.images import decode_image
from flashvl.data.storage import locate
from flashvl.engine import Engine, Request
from flashvl.model.loading import load_model, load_processor
from flashvl.train.run.checkpoint import list_checkpoints
from flashvl.train.run.export import read_log
from tests.support.cluster import wait_until
from tests.support.hosts import Network
from tests.support.images import encode
from tests.support.jobs import captions_of
from tests.support.rehearsal import PROGRAMS, Fleet, read_environment
from tests.support.stages import assert_every_row_once

NUM_ROWS, NUM_PICTURES = 12_000, 20
NUM_STEPS, BATCH_SIZE = 500, 8
NUM_CPUS = 5
MAX_NEW_TOKENS = 32
RECIPE = {
    "kind": "supervised",
    "stage": "hosts",
    "init_from": "tiny",
    "data": {"synthetic": {"count": NUM_STEPS * BATCH_SIZE, "seed": 5}},
    "trainable": ["multi_modal_projector"],
    "global_batch_size": BATCH_SIZE,
    "token_budget": 1000,
    "max_length": 1000,
    "num_workers": 4,
    "threads_per_worker": 3,  # more than half of a host's: each host has one worker
    "use_gpu": False,
    "precision": "fp32",
    "learning_rate": 1e-4,
    "save_steps": 5,
    "save_total_limit": 2,
}


@pytest.mark.hosts
@pytest.mark.timeout(1800)
def test_jobs_survive_the_loss_of_hosts(network: Network, tmp_path: Path) -> None:
    pictures = [
        encode(synthetic.sample("heldout", 1, index).image()) for index in range(NUM_PICTURES)
    ]
    images = [pictures[row % NUM_PICTURES] for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"image": images}), tmp_path / "in.parquet", row_group_size=200)
    stage, recipe = tmp_path / "stage", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(stage)}))

    fleet = Fleet(network=network, environment=read_environment(RAY_gcs_storage_path="/tmp/ray/g"))
    fleet.start_head()
    hosts = [fleet.add_worker(num_cpus=NUM_CPUS) for _ in range(4)]
    fleet.wait_for(*hosts)
    fleet.submit("train", "python", "ray_jobs/train.py", str(recipe))
    wait_for_checkpoint(stage)
    fleet.submit(
        "caption",
        *("python", "ray_jobs/caption.py", str(tmp_path / "in.parquet")),
        *("--output", str(tmp_path / "out"), "--dtype", "float32"),
        *("--max-new-tokens", str(MAX_NEW_TOKENS)),
    )
    wait_until(lambda: "captioning: " in fleet.log("caption"), 240)

    drivers = {fleet.job(name)["driver_info"]["node_ip_address"] for name in ("train", "caption")}
    lost, other = [host for host in hosts if host.address not in drivers][:2]
    other.cut_off()
    time.sleep(8)
    other.plug_in()
    assert other.address in fleet.addresses()
    wait_for_checkpoint(stage)

    assert fleet.job("caption")["status"] == fleet.job("train")["status"] == "RUNNING"
    lost.lose()
    fleet.add_worker(num_cpus=NUM_CPUS)  # a platform replaces what it has lost
    wait_until(lambda: lost.address not in fleet.addresses(), 60)
    wait_for_checkpoint(stage)

    assert fleet.job("train")["status"] == "RUNNING"
    other.cut_off()
    time.sleep(40)  # Ray counts it as dead after 20 to 65 s
    other.plug_in()
    fleet.wait_for(other)  # its unit brings it back, if it counted as dead
    fleet.wait_for_job("caption", 600)
    fleet.wait_for_job("train", 600)

    assert_every_row_once(stage, NUM_STEPS, NUM_STEPS * BATCH_SIZE)
    alone = tmp_path / "alone"
    settings = [f"output_dir={alone}", "num_workers=1", "threads_per_worker=1"]
    subprocess.run([PROGRAMS / "flashvl", "train", recipe, *settings], check=True, timeout=600)
    losses, truth = ([record["loss"] for record in read_log(each)] for each in (stage, alone))
    assert losses == pytest.approx(truth, abs=1e-4)

    captions = captions_of(tmp_path / "out")
    assert sorted(captions) == list(range(NUM_ROWS))
    expected = answers(pictures)
    assert all(text == expected[row % NUM_PICTURES] for row, text in captions.items())


def wait_for_checkpoint(stage: Path) -> None:
    """Wait until training has got on by a checkpoint."""
    output = locate(str(stage))

    def last_step() -> int:
        found = list_checkpoints(output)
        return found[-1].state.step if found else 0

    before = last_step()
    wait_until(lambda: last_step() > before, 300)


def answers(pictures: list[bytes]) -> list[str]:
    """The captions of an engine of our own."""
    engine = Engine(load_model("tiny"), load_processor("tiny"))
    question = [{"role": "user", "content": f"<image>\n{DEFAULT_PROMPT}"}]
    requests = [
        Request(messages=question, images=[decode_image(picture)], max_new_tokens=MAX_NEW_TOKENS)
        for picture in pictures
    ]
    return [completion.text for completion in engine.generate(requests)]
