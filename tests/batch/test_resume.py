"""A stopped job resumes: no row is lost, doubled, captioned twice or mixed with another job's."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flashvl.batch import job as job_module
from flashvl.batch.captioner import CAPTIONED
from flashvl.batch.config import CaptionJob
from flashvl.batch.job import run_caption_job
from flashvl.batch.outputs import RESULTS
from flashvl.cli import app
from flashvl.data.inputs.find import find_source
from flashvl.data.inputs.parquet import ParquetFiles
from flashvl.data.ledger.lock import held
from flashvl.data.ledger.manifest import MANIFEST
from flashvl.data.ledger.outputs import OutputFolder
from flashvl.data.storage import locate
from flashvl.errors import ConfigError, FlashVLError
from tests.support.jobs import Interrupted, make_job, picture, rows_of

NUM_ROWS = 60
BAD = {7, 31, 32}


def write_input(path: Path, num_rows: int = NUM_ROWS, row_group_size: int = 16) -> Path:
    images = [b"no image" if row in BAD else picture(row) for row in range(num_rows)]
    ids = [f"id {row % 50}" for row in range(num_rows)]  # some twice: ids need not be unique
    pq.write_table(pa.table({"id": ids, "image": images}), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def job(tiny_random: Path, tmp_path: Path) -> CaptionJob:
    return make_job(tiny_random, write_input(tmp_path / "in.parquet"), tmp_path / "out")


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, tiny_random: Path, tmp_path_factory: pytest.TempPathFactory
) -> CaptionJob:
    """A job whose output is finished, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    job = make_job(tiny_random, write_input(folder / "in.parquet"), folder / "out")
    run_caption_job(job)
    return job


def test_an_interrupted_job_goes_on_with_the_rest(
    ray_cluster: None, job: CaptionJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashvl.data.ledger.tables.BYTES_PER_FILE", 200)
    whole = job.model_copy(update={"output": job.output + "-whole"})
    run_caption_job(whole)

    captioned: list[int] = []
    pipeline = job_module.captioned

    def watched(*args: Any) -> Any:
        for rows in pipeline(*args):
            captioned.extend(rows["row"].to_pylist())
            yield rows

    monkeypatch.setattr(job_module, "captioned", watched)

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done > 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_caption_job(job, interrupt)
    assert not (Path(job.output) / "_summary.json").exists()
    on_disk = set(rows_of(Path(job.output)))
    assert 0 < len(on_disk) < NUM_ROWS
    (Path(job.output) / "captions" / ".unfinished-part-00099.parquet").write_bytes(b"half a file")

    captioned.clear()
    progress: list[int] = []
    summary = run_caption_job(job, lambda done, total, note="": progress.append(done))
    assert set(captioned) == set(range(NUM_ROWS)) - on_disk
    assert len(captioned) == NUM_ROWS - len(on_disk)
    assert progress[0] > len(on_disk) and progress[-1] == NUM_ROWS
    assert (summary.input, summary.dead) == (NUM_ROWS, len(BAD))
    assert rows_of(Path(job.output)) == rows_of(Path(whole.output))
    assert not list(Path(job.output).rglob(".*"))

    captioned.clear()
    assert run_caption_job(job) == summary  # all rows are done: nothing happens
    assert captioned == []
    again = run_caption_job(job.model_copy(update={"restart": True}))
    assert len(captioned) == NUM_ROWS and again.written == summary.written


def test_sigterm_keeps_what_is_done(ray_cluster: None, job: CaptionJob) -> None:
    def terminate(done: int, total: int, note: str = "") -> None:
        if done:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FlashVLError, match=r"stopped by SIGTERM with \d+ of 60 rows on disk"):
        run_caption_job(job, terminate)
    assert signal.getsignal(signal.SIGTERM) == before
    assert 0 < len(rows_of(Path(job.output))) < NUM_ROWS
    run_caption_job(job)
    assert len(rows_of(Path(job.output))) == NUM_ROWS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "What is it?"}, "prompt was 'Describe the image.' and is 'What is it?'"),
        ({"max_new_tokens": 5}, "max_new_tokens was 4 and is 5"),
        ({"model": "tiny"}, "model was '"),
    ],
    ids=str,
)
def test_another_job_is_refused_with_both_values(
    finished: CaptionJob, change: dict[str, Any], said: str
) -> None:
    before = rows_of(Path(finished.output))
    with pytest.raises(ConfigError) as error:
        run_caption_job(finished.model_copy(update=change))
    assert said in str(error.value) and "--restart" in str(error.value)
    assert rows_of(Path(finished.output)) == before


def test_a_changed_input_or_model_is_refused(
    ray_cluster: None, job: CaptionJob, tmp_path: Path
) -> None:
    run_caption_job(job)
    write_input(Path(job.input), num_rows=61)
    with pytest.raises(ConfigError, match="in.parquet changed since"):
        run_caption_job(job)
    summary = run_caption_job(job.model_copy(update={"restart": True}))
    assert summary.input == 61 and set(rows_of(Path(job.output))) == set(range(61))


def test_the_second_of_two_runs_is_refused(ray_cluster: None, job: CaptionJob) -> None:
    with (
        held(locate(job.output)),
        pytest.raises(ConfigError, match="another job is running on output"),
    ):
        run_caption_job(job)
    assert run_caption_job(job).input == NUM_ROWS


def test_rows_that_are_there_twice_are_never_a_success(
    finished: CaptionJob, tmp_path: Path
) -> None:
    job = finished.model_copy(update={"output": str(tmp_path / "out")})
    shutil.copytree(finished.output, job.output)
    (Path(job.output) / "_summary.json").unlink()
    (part,) = (Path(job.output) / "captions").glob("part-*")
    part.with_name("part-00007.parquet").write_bytes(part.read_bytes())
    with pytest.raises(FlashVLError, match=r"audit failed: .* holds row \d+ twice"):
        run_caption_job(job)


def test_an_unreadable_manifest_is_refused(job: CaptionJob) -> None:
    Path(job.output).mkdir()
    (Path(job.output) / MANIFEST).write_text('{"prompt": "Desc')
    with pytest.raises(ConfigError, match="not readable; give --restart"):
        run_caption_job(job)


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_a_source_reads_what_is_not_done_and_no_row_group_in_vain(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("in")
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    for number, size in enumerate(sizes):
        write_input(folder / f"{number}.parquet", size, data.draw(st.integers(1, 12)))
    source = find_source(str(folder))
    assert isinstance(source, ParquetFiles)
    total = sum(sizes)
    assert source.num_rows == total
    is_done = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool)
    if is_done.all():
        is_done[0] = False
    groups = [count for table in source.tables for count in table.row_groups]
    parts = np.split(is_done, np.cumsum(groups)[:-1])
    assert len(list(source._pieces(is_done))) == sum(not part.all() for part in parts)
    rows = source.read(is_done).take_all()
    assert sorted(row["row"] for row in rows) == np.flatnonzero(~is_done).tolist()
    starts = np.cumsum([0, *sizes])
    for row in rows:
        place = row["row"] - starts[np.searchsorted(starts, row["row"], "right") - 1]
        assert row["id"] == f"id {place % 50}"


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_it_ends_as_if_undisturbed(
    tiny_random: Path, tmp_path: Path
) -> None:
    """Run the command itself, and kill it at random moments until it succeeds."""
    source = write_input(tmp_path / "in.parquet", num_rows=3000, row_group_size=500)
    options = ["--model", str(tiny_random), "--max-new-tokens", "4", "--max-num-seqs", "8"]

    def command(output: Path) -> list[str]:
        code = (
            "import flashvl.data.ledger.tables as o; o.BYTES_PER_FILE = 5000;"
            "from flashvl.cli import main; main()"
        )
        return [sys.executable, "-c", code, "caption", str(source), "--output", str(output)]

    whole, output = tmp_path / "whole", tmp_path / "out"
    assert subprocess.run([*command(whole), *options]).returncode == 0
    rng = random.Random(0)
    num_kills = 0
    while True:
        process = subprocess.Popen([*command(output), *options], start_new_session=True)
        try:
            returncode = process.wait(timeout=rng.uniform(8, 14))
        except subprocess.TimeoutExpired:
            num_kills += 1
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            returncode = process.wait(timeout=120)
            time.sleep(1)
        if returncode == 0:
            break
    assert num_kills >= 2
    assert rows_of(output) == rows_of(whole)
    assert json.loads((output / "_summary.json").read_text())["input"] == 3000


def test_the_command_goes_on_and_tells_that_all_is_done(finished: CaptionJob) -> None:
    command = ["caption", finished.input, "--output", finished.output, "--model", finished.model]
    command += ["--dtype", "float32"]
    result = CliRunner().invoke(app, [*command, "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output
    assert "60 images, 57 captions, 3 dead letters" in result.stdout
    result = CliRunner().invoke(app, [*command, "--max-new-tokens", "5"])
    assert result.exit_code == 2
    assert "max_new_tokens was 4 and is 5" in result.stderr


def test_no_row_waits_long_for_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvl.data.ledger.tables.SECONDS_PER_FILE", 0.0)
    output = OutputFolder(locate(tmp_path / "out"), 3, RESULTS, pa.schema([]))
    for row in range(3):
        output.write(pa.Table.from_pylist([{"row": row}], schema=CAPTIONED))
        assert output.results.count_rows() == row + 1
    assert len(list((tmp_path / "out" / "dead_letters").iterdir())) == 0
