"""Where Ray Data alone loses rows or mixes answers and says that all is well, our job does not.

Each test shows the loss by the naive use first, so that it tells when Ray mends it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from flashvl.batch.config import CaptionJob
from flashvl.batch.job import run_caption_job
from flashvl.errors import ConfigError
from tests.support.jobs import picture, rows_of

NUM_ROWS = 80
ROWS_PER_FILE = 10


@pytest.fixture
def table(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for first in range(0, NUM_ROWS, ROWS_PER_FILE):
        rows = range(first, first + ROWS_PER_FILE)
        images = [picture(row) for row in rows]
        pq.write_table(
            pa.table({"id": [f"{row:03d}" for row in rows], "image": images}),
            folder / f"{first:03d}.parquet",
        )
    return folder


@pytest.fixture
def job(
    tiny_random: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CaptionJob:
    monkeypatch.setattr("flashvl.data.ledger.tables.BYTES_PER_FILE", 1)
    return CaptionJob(
        input=str(table),
        output=str(tmp_path / "ours"),
        model=str(tiny_random),
        dtype="float32",
        max_new_tokens=3,
        max_num_seqs=8,
    )


class Crash(Exception):
    pass


def crash_in_the_middle(done: int, total: int, note: str = "") -> None:
    if done > NUM_ROWS // 3:
        raise Crash


def interrupt(job: CaptionJob) -> None:
    with pytest.raises(Crash):
        run_caption_job(job, crash_in_the_middle)
    assert 0 < len(rows_of(Path(job.output))) < NUM_ROWS


@pytest.fixture
def checkpointed(tmp_path: Path) -> Any:
    """Ray Data's own checkpointing, as its pages show it."""
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=str(tmp_path / "checkpoint"),
        delete_checkpoint_on_success=False,
    )
    yield
    context.checkpoint_config = None


def run_naively(
    table: list[Path], output: Path, answer: Callable[[dict[str, Any]], dict[str, Any]], mode: str
) -> None:
    ray.data.read_parquet([str(file) for file in table]).map(answer).write_parquet(
        str(output), mode=mode
    )


def say(text: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {"id": row["id"], "caption": text}


def num_written(folder: Path) -> int:
    return pq.read_table(folder).num_rows


@pytest.mark.slow
def test_overwriting_on_resume_loses_what_was_done(
    ray_cluster: None, checkpointed: None, table: Path, job: CaptionJob, tmp_path: Path
) -> None:
    files, output = sorted(table.iterdir()), tmp_path / "naive"
    run_naively(files[:4], output, say("one"), "overwrite")  # the rows that a job had reached
    run_naively(files, output, say("one"), "overwrite")
    assert num_written(output) < NUM_ROWS  # the job reported success

    interrupt(job)
    assert run_caption_job(job).written == NUM_ROWS == len(rows_of(Path(job.output)))


@pytest.mark.slow
def test_a_changed_function_mixes_old_and_new(
    ray_cluster: None, checkpointed: None, table: Path, job: CaptionJob, tmp_path: Path
) -> None:
    files, output = sorted(table.iterdir()), tmp_path / "naive"
    run_naively(files[:4], output, say("old"), "append")
    run_naively(files, output, say("new"), "append")
    assert set(pq.read_table(output)["caption"].to_pylist()) == {"old", "new"}

    interrupt(job)
    with pytest.raises(ConfigError, match="prompt was 'Describe the image.' and is 'What"):
        run_caption_job(job.model_copy(update={"prompt": "What is it?"}))


@pytest.mark.slow
def test_one_bad_row_takes_good_ones_with_it(
    ray_cluster: None, table: Path, job: CaptionJob, tmp_path: Path
) -> None:
    bad = table / "000.parquet"
    images = [b"no image", *pq.read_table(bad)["image"].to_pylist()[1:]]
    ids = pq.read_table(bad)["id"]
    pq.write_table(pa.table({"id": ids, "image": images}), bad)

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        if row["image"] == b"no image":
            raise Crash
        return {"id": row["id"]}

    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    try:
        run_naively(sorted(table.iterdir()), tmp_path / "naive", answer, "append")
    finally:
        context.max_errored_blocks = 0
    files = list((tmp_path / "naive").glob("*.parquet"))
    assert sum(pq.read_metadata(file).num_rows for file in files) < NUM_ROWS - 1

    summary = run_caption_job(job)
    assert (summary.written, summary.dead) == (NUM_ROWS - 1, 1)


@pytest.mark.slow
def test_a_missing_file_becomes_none(
    ray_cluster: None, job: CaptionJob, table: Path, tmp_path: Path
) -> None:
    from ray.data.expressions import download

    paths = [str(tmp_path / f"{row}.png") for row in range(4)]
    for path in paths[1:]:
        Path(path).write_bytes(picture(0))
    rows = ray.data.from_arrow(pa.table({"image": paths}))
    found = rows.with_column("bytes", download("image")).take_all()
    assert sum(row["bytes"] is None for row in found) == 1  # no error is reported

    pq.write_table(pa.table({"image": paths}), tmp_path / "paths.parquet")
    summary = run_caption_job(job.model_copy(update={"input": str(tmp_path / "paths.parquet")}))
    assert (summary.written, summary.dead) == (3, 1)
    assert rows_of(Path(job.output))[0]["error"] == "FileNotFoundError"
