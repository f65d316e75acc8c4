"""An input that grows: new rows are captioned once, and old captions stay as they are."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashvl.batch import job as job_module
from flashvl.batch.config import CaptionJob
from flashvl.batch.job import Plan, check_caption_job, run_caption_job
from flashvl.config import validate
from flashvl.data.ledger.manifest import MANIFEST, claim, read_files
from flashvl.data.ledger.outputs import check_output
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError
from tests.support.images import base64_of
from tests.support.jobs import (
    NUM_ROWS,
    PICTURES,
    Interrupted,
    make_job,
    picture,
    rows_of,
    write_tar,
)


def add(folder: Path, kind: str, name: str, images: list[bytes]) -> None:
    """Write a file of an input, or one file for each image."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"image": images}), path, row_group_size=2)
    elif kind == "png":
        for number, data in enumerate(images):
            path.with_name(f"{name}{number:02d}.png").write_bytes(data)
    elif kind == "jsonl":
        lines = [json.dumps({"image": base64_of(data)}) for data in images]
        path.write_text("\n".join(lines))
    else:
        write_tar(path, {f"{name}{n:02d}.png": data for n, data in enumerate(images)})


def begin(job: CaptionJob) -> Plan:
    """Do what a job does before it is killed, before its first row."""
    plan = check_caption_job(job)
    plan.output.make_folder()
    claim(plan.output, plan.fingerprint, plan.source.files, plan.known)
    return plan


@pytest.mark.parametrize("kind", [pytest.param("parquet", marks=pytest.mark.slow), "png"])
def test_new_files_are_captioned_behind_the_old_ones(
    plain: dict[int, str],
    tiny_random: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr("flashvl.data.ledger.tables.BYTES_PER_FILE", 1)
    captioned: list[int] = []
    pipeline = job_module.captioned

    def watched(*args: Any) -> Any:
        for rows in pipeline(*args):
            captioned.extend(rows["row"].to_pylist())
            yield rows

    monkeypatch.setattr(job_module, "captioned", watched)
    folder, output = tmp_path / "in", tmp_path / "out"
    add(folder, kind, "m", PICTURES[:4])
    job = make_job(tiny_random, folder, output, append=True, max_num_seqs=2, max_error_rate=1)
    run_caption_job(job)
    before = {path: path.read_bytes() for path in output.rglob("part-*")}

    add(folder, kind, "a", [*PICTURES[4:6], b"no image"])  # its name sorts first
    summary = run_caption_job(job)
    assert (summary.input, summary.written, summary.dead) == (7, 6, 1)
    assert captions_of_well(output) == {place: plain[place] for place in range(6)}
    assert all(path.read_bytes() == data for path, data in before.items())

    add(folder, kind, "b", PICTURES[6:9])
    add(folder, kind, "z", PICTURES[9:])

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done > 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_caption_job(job, interrupt)
    assert not (output / "_summary.json").exists()
    on_disk = set(rows_of(output))
    assert 7 < len(on_disk) < NUM_ROWS + 1
    add(folder, kind, "0", PICTURES[:1])  # while the file was away
    captioned.clear()
    with pytest.raises(ConfigError, match="the input has 1 new files, as .*0.*--append"):
        run_caption_job(job.model_copy(update={"append": False}))
    summary = run_caption_job(job)
    assert set(captioned) == set(range(NUM_ROWS + 2)) - on_disk
    assert len(captioned) == len(set(captioned)) and summary.input == NUM_ROWS + 2
    rows = captions_of_well(output)
    wanted = [plain[place] for place in range(NUM_ROWS)]
    assert [rows[place] for place in (*range(6), *range(7, NUM_ROWS + 2))] == [*wanted, plain[0]]
    assert rows_of(output)[6]["step"] == "decode"

    captioned.clear()
    assert run_caption_job(job) == run_caption_job(job.model_copy(update={"append": False}))
    assert captioned == []
    assert len(list(output.glob("_files-*"))) == 1


def captions_of_well(output: Path) -> dict[int, str]:
    return {place: row["caption"] for place, row in rows_of(output).items() if "caption" in row}


@pytest.mark.parametrize("kind", ["parquet", "png", "jsonl", "tar"])
def test_every_kind_of_input_keeps_its_rows_places(
    tiny_random: Path, tmp_path: Path, kind: str
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    add(folder, kind, "m", PICTURES[:3])
    job = make_job(tiny_random, f"{folder}/*.{kind}", output, append=True)
    first = begin(job).source
    add(folder, kind, "a", PICTURES[3:5])
    add(folder, kind, "z", PICTURES[5:6])
    plan = check_caption_job(job)
    assert plan.describe()["new_files"] == len(plan.source.files) - len(first.files)
    assert plan.source.files[: len(first.files)] == first.files
    assert plan.source.num_rows == 6
    paths = [Path(file.path).name[0] for file in plan.source.files]
    assert "".join(dict.fromkeys(paths)) == "maz"
    begin(job)
    assert read_files(plan.output) == plan.source.files
    again = job.model_copy(update={"append": False, "input": str(folder)})
    assert check_caption_job(again).source.files == plan.source.files


def test_an_input_that_changed_otherwise_is_refused(tiny_random: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    add(folder, "parquet", "a", PICTURES[:3])
    add(folder, "parquet", "b", PICTURES[:3])
    job = make_job(tiny_random, folder, output, append=True)
    begin(job)
    add(folder, "parquet", "c", PICTURES[3:4])
    before = {path: path.read_bytes() for path in output.rglob("*")}

    def refused(**changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            run_caption_job(job.model_copy(update=changes))
        assert {path: path.read_bytes() for path in output.rglob("*")} == before
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "1 new files" in refused(append=False) and "c.parquet" in refused(append=False)
    assert "prompt was 'Describe the image.' and is 'What?'" in refused(prompt="What?")
    assert "dtype was 'float32' and is 'bfloat16'" in refused(dtype="bfloat16")
    file = folder / "a.parquet"
    saved, stat = file.read_bytes(), file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert "a.parquet changed since" in refused()
    file.write_bytes(saved + b"x")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "a.parquet" in refused()
    file.unlink()
    assert "a.parquet is no longer in the input" in refused()
    file.write_bytes(saved)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pq.write_table(pa.table({"image": ["a.png"]}), folder / "c.parquet")
    assert "c.parquet: column 'image' has type string" in refused()
    (folder / "c.parquet").unlink()
    assert check_caption_job(job).source.num_rows == 6
    values = {"input": "a", "output": "b", "append": True, "restart": True}
    with pytest.raises(ConfigError, match="append keeps what restart throws away"):
        validate(CaptionJob, values, source="caption")
    with pytest.raises(ConfigError, match="must not be on the hub"):
        validate(CaptionJob, {"input": "a", "output": "hf://datasets/a/b"}, source="caption")


def test_a_job_killed_while_it_notes_new_files_goes_on(
    tiny_random: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two files was written, they agree, or the older list is still valid."""
    folder, output = tmp_path / "in", tmp_path / "out"
    add(folder, "png", "m", PICTURES[:2])
    job = make_job(tiny_random, folder, output, append=True)
    write = Location.write

    def killed_at(name: str) -> None:
        def broken(self: Location, data: bytes) -> None:
            if self.path.endswith(name):
                raise Interrupted
            write(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(Location, "write", broken)
            with pytest.raises(Interrupted):
                begin(job)

    killed_at(MANIFEST)
    check_output(locate(output))  # a folder with only a list is a job's output
    old = begin(job).source.files
    add(folder, "png", "a", PICTURES[2:4])
    killed_at(".parquet")
    assert read_files(locate(output)) == old
    killed_at(MANIFEST)
    assert read_files(locate(output)) == old and len(list(output.glob("_files-*"))) == 2
    new = begin(job).source.files
    assert read_files(locate(output)) == new and new[:2] == old and len(new) == 4
    assert len(list(output.glob("_files-*"))) == 1


def test_another_job_that_added_files_meanwhile_is_seen(tiny_random: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    add(folder, "png", "m", PICTURES[:2])
    job = make_job(tiny_random, folder, output, append=True)
    begin(job)
    add(folder, "png", "z", PICTURES[2:4])
    late = check_caption_job(job)
    add(folder, "png", "a", PICTURES[4:5])
    begin(job)
    with pytest.raises(ConfigError, match="num_rows was 5 and is 4"):
        claim(late.output, late.fingerprint, late.source.files, late.known)


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_appending_killed_again_and_again_ends_as_if_undisturbed(
    tiny_random: Path, tmp_path: Path
) -> None:
    """Run the command itself, kill it twice for each new table, then let it succeed."""
    folder, output, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"

    def num_files(output: Path) -> int:
        return len(list((output / "captions").glob("*.parquet")))

    def images(first: int) -> list[bytes]:
        return [b"no image" if row % 97 == 5 else picture(row) for row in range(first, first + 900)]

    def command(to: Path) -> list[str]:
        code = (
            "import flashvl.data.ledger.tables as o; o.BYTES_PER_FILE = 5000;"
            "from flashvl.cli import main; main()"
        )
        options = ["--model", str(tiny_random), "--max-new-tokens", "4", "--max-num-seqs", "8"]
        options += ["--append", "--max-error-rate", "0.1", "--dtype", "float32"]
        return [sys.executable, "-c", code, "caption", str(folder), "--output", str(to), *options]

    add(folder, "tar", "m", images(0))
    assert subprocess.run(command(output)).returncode == 0
    rng = random.Random(0)
    for name in ("a", "z"):
        add(folder, "tar", name, images(1000 if name == "a" else 2000))
        for number in (signal.SIGKILL, signal.SIGTERM):
            process = subprocess.Popen(command(output), start_new_session=True)
            # Kill it by what is on disk, not by time: a busy machine takes long to start Ray.
            enough = num_files(output) + rng.randint(1, 3)
            while process.poll() is None and num_files(output) < enough:
                time.sleep(0.05)
            process.send_signal(number)
            assert process.wait(timeout=120) != 0
            time.sleep(1)
        assert subprocess.run(command(output)).returncode == 0
    assert subprocess.run(command(whole)).returncode == 0

    def by_id(rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
        return {row.pop("id"): row for row in rows.values() if row.pop("row") >= 0}

    found = rows_of(output)
    assert sorted(found) == list(range(2700))
    assert [found[place]["id"][0] for place in (0, 899, 900, 1799, 1800)] == list("mmaaz")
    assert by_id(found) == by_id(rows_of(whole))
