"""Each family's data set, in its real layout: every row is converted or a dead letter, once."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashvl.data.convert.config import ConversionJob
from flashvl.data.convert.job import Plan, check_conversion, convert
from flashvl.data.features import decode_tiles, encode_conversation
from flashvl.data.inspection import whole_conversation
from flashvl.data.schema import CONVERSATIONS, PREFERENCES, PROMPTS
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError, FlashVLError
from flashvl.model.loading import load_processor
from flashvl.train.feed.feed import build_feed
from flashvl.train.feed.mixture import TrainingData
from flashvl.train.feed.tables import open_table
from tests.support import sets
from tests.support.jobs import Interrupted
from tests.support.stores import s3_bucket

FAMILIES: dict[str, tuple[Callable[[Path], sets.Expected], dict[str, str], pa.Schema]] = {
    "webdataset": (sets.write_infinity, {}, CONVERSATIONS),
    "llava": (sets.write_llava, {"images": "images"}, CONVERSATIONS),
    "onevision": (sets.write_onevision, {}, CONVERSATIONS),
    "tables": (sets.write_chartqa, {"mapping": "_chartqa.yaml"}, CONVERSATIONS),
    "reasoning": (sets.write_reasoning, {}, CONVERSATIONS),
    "preferences": (sets.write_feedback, {"images": "merged_images"}, PREFERENCES),
    "problems": (sets.write_problems, {}, PROMPTS),
}


def make_job(family: str, folder: Path, **options: Any) -> tuple[ConversionJob, sets.Expected]:
    """A family's sample below `folder`, and the job that converts it to `folder/out`."""
    write, paths, _ = FAMILIES[family]
    expected = write(folder / "in")
    values: dict[str, Any] = {name: str(folder / "in" / path) for name, path in paths.items()}
    values |= {"input": str(folder / "in"), "output": str(folder / "out")}
    job = ConversionJob.model_validate(
        {"family": family, "max_error_rate": 0.9, **values, **options}
    )
    return job, expected


def results_of(job: ConversionJob) -> list[dict[str, Any]]:
    name = FAMILIES[job.family][2]
    table = {id(CONVERSATIONS): "conversations", id(PREFERENCES): "preferences"}
    return pq.read_table(Path(job.output) / table.get(id(name), "prompts")).to_pylist()


def outcome_of(job: ConversionJob) -> dict[int, Any]:
    """By row: the contents of a result's messages, or the step and reason of a dead letter."""
    found: dict[int, Any] = {}
    for row in results_of(job):
        texts = tuple(message["content"] for message in whole_conversation(row))
        if "rejected" in row:
            texts += (row["rejected"][0]["content"],)
        assert row["row"] not in found
        found[row["row"]] = texts
    for row in pq.read_table(Path(job.output) / "dead_letters").to_pylist():
        assert row["row"] not in found
        found[row["row"]] = f"{row['step']}: {row['reason']}"
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_converted_or_told_why_not(
    ray_cluster: None, family: str, tmp_path: Path
) -> None:
    job, expected = make_job(family, tmp_path)
    summary = convert(job)
    found = outcome_of(job)
    assert sorted(found) == sorted(expected)
    for row, wanted in expected.items():
        if isinstance(wanted, str):
            assert isinstance(found[row], str) and found[row].startswith(wanted), (row, found[row])
        else:
            assert found[row] == wanted, row
    num_dead = sum(isinstance(wanted, str) for wanted in expected.values())
    assert (summary.input, summary.dead) == (len(expected), num_dead)
    assert summary.written == len(expected) - num_dead


@pytest.mark.parametrize("family", FAMILIES)
def test_training_can_read_what_is_written(ray_cluster: None, family: str, tmp_path: Path) -> None:
    job, _ = make_job(family, tmp_path)
    plan = check_conversion(job)
    convert(job)
    for file in Path(plan.table.path).iterdir():
        stored = pq.read_schema(file)
        for field in FAMILIES[family][2]:
            assert stored.field(field.name).type == field.type
    processor = load_processor("tiny")
    rows = results_of(job)
    assert any(row["images"] for row in rows) or family == "reasoning"
    for row in rows:
        assert all(image in sets.JPEG for image in row["images"]), "images keep their bytes"
        tiles = decode_tiles(row["images"], processor)
        encode_conversation(whole_conversation(row), tiles.counts, processor, 10**6)


@pytest.mark.parametrize("place", ["", "conversations"])
def test_a_recipe_may_name_the_output_or_its_table(
    ray_cluster: None, tmp_path: Path, place: str
) -> None:
    job, _ = make_job("webdataset", tmp_path)
    convert(job)
    rows = results_of(job)
    table, sizes = open_table(str(Path(job.output) / place), 0)
    assert sum(sizes) == table.num_rows == len(rows)
    read = [row for _, row in table.read(np.arange(len(rows)))]
    assert read == [{name: row[name] for name in ("images", "messages")} for row in rows]
    feed = build_feed(
        TrainingData(parquet=str(Path(job.output) / place)),
        model="tiny",
        global_batch_size=2,
        max_length=4096,
        token_budget=4096,
        seed=0,
    )
    assert (feed.num_rows, feed.num_steps) == (len(rows), -(-len(rows) // 2))


def test_a_table_has_small_row_groups(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [{"input": f"{n}?", "content": str(n)} for n in range(200)]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "in" / "a.jsonl").write_text(lines)
    job = ConversionJob(
        family="reasoning", input=str(tmp_path / "in"), output=str(tmp_path / "out")
    )
    assert convert(job).written == 200
    for file in (tmp_path / "out" / "conversations").iterdir():
        footer = pq.read_metadata(file)
        assert max(footer.row_group(n).num_rows for n in range(footer.num_row_groups)) <= 64


def test_paths_of_another_machine_are_found_by_their_names(
    ray_cluster: None, tmp_path: Path
) -> None:
    """MMDU names its images by absolute paths of the machine that it was made on."""
    job, _ = make_job("llava", tmp_path, images=str(tmp_path / "in" / "images" / "coco"))
    convert(job)
    assert outcome_of(job)[2] == ("<image> <image> alike?", "No.")


def test_an_interrupted_conversion_goes_on_with_the_rest(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashvl.data.ledger.tables.BYTES_PER_FILE", 1)
    job, expected = make_job("onevision", tmp_path)

    def interrupt(done: int, total: int, note: str = "") -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        convert(job, interrupt)
    num_before = len(outcome_of_part(job))
    assert 0 < num_before < len(expected)
    assert check_conversion(job).describe()["done"] == num_before
    summary = convert(job)
    assert summary.input == len(outcome_of(job)) == len(expected)
    assert convert(job) == summary

    with pytest.raises(ConfigError, match="family was 'onevision' and is 'llava'"):
        convert(job.model_copy(update={"family": "llava"}))
    with pytest.raises(ConfigError, match="limits was"):
        limits = job.image_limits.model_copy(update={"max_image_side": 77})
        convert(job.model_copy(update={"image_limits": limits}))


def outcome_of_part(job: ConversionJob) -> list[int]:
    """The rows that an unfinished output holds."""
    files = Path(job.output).rglob("part-*.parquet")
    return [row for file in files for row in pq.read_table(file)["row"].to_pylist()]


def test_a_trial_is_followed_by_the_rest_and_by_new_files(
    ray_cluster: None, tmp_path: Path
) -> None:
    job, expected = make_job("reasoning", tmp_path, max_rows=2)
    assert convert(job).input == 2
    whole = job.model_copy(update={"max_rows": None})
    assert convert(whole).input == len(expected)
    (tmp_path / "in" / "more.jsonl").write_text('{"input": "a", "content": "b"}\n')
    with pytest.raises(ConfigError, match="give --append to add their rows"):
        convert(whole)
    assert convert(whole.model_copy(update={"append": True})).input == len(expected) + 1


def test_sigterm_keeps_what_is_done(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, expected = make_job("onevision", tmp_path)

    def terminate(done: int, total: int, note: str = "") -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(FlashVLError, match=r"stopped by SIGTERM with \d+ of 6 rows on disk"):
        convert(job, terminate)
    assert 0 < len(outcome_of_part(job)) < len(expected)
    assert convert(job).input == len(outcome_of(job))


def test_too_many_dead_letters_stop_the_job(ray_cluster: None, tmp_path: Path) -> None:
    job, _ = make_job("reasoning", tmp_path, max_error_rate=0)
    with pytest.raises(FlashVLError, match="are dead letters, more than max_error_rate"):
        convert(job)


def test_a_store_is_read_and_written(ray_cluster: None, tmp_path: Path) -> None:
    expected = sets.write_llava(tmp_path / "in")
    with s3_bucket() as (_, uri):  # whose objects other tests' servers share
        for file in (tmp_path / "in").rglob("*"):
            if file.is_file():
                key = f"bucket/llava/{file.relative_to(tmp_path / 'in')}"
                store = locate(uri.format("llava")).store
                store.pipe_file(key, file.read_bytes())
        job = ConversionJob(
            family="llava",
            input=uri.format("llava/mix.json"),
            images=uri.format("llava/images"),
            output=uri.format("converted"),
            max_error_rate=0.9,
        )
        summary = convert(job)
        assert summary.input == len(expected)
        assert summary.dead == sum(isinstance(wanted, str) for wanted in expected.values())
        folder = locate(uri.format("converted"))
        rows = [
            row
            for name in (folder / "conversations").names()
            for row in pq.read_table(
                pa.BufferReader((folder / "conversations" / name).read())
            ).to_pylist()
        ]
        assert sorted(len(row["images"]) for row in rows) == [0, 1, 2]


def refusal(tmp_path: Path, **options: Any) -> str:
    values = {"family": "llava", "input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError) as error:
        check_conversion(ConversionJob.model_validate(values | options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_a_wrong_job_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    assert "does not exist" in refusal(tmp_path)
    folder.mkdir()
    (folder / "a.txt").touch()
    assert "holds no *.jsonl, *.parquet, *.json" in refusal(tmp_path)
    assert "holds no *.tar" in refusal(tmp_path, family="webdataset")
    (folder / "a.json").write_text('[{"image": "x"}]')
    assert "no record has the field 'conversations'; fields: image" in refusal(tmp_path)
    assert "lies in the input" in refusal(tmp_path, output=str(folder / "out"))
    (folder / "a.json").write_text('[{"conversations": []}]')
    assert "is not a folder" in refusal(tmp_path, images=str(tmp_path / "nowhere"))
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("imagee: a\n")
    wrong = refusal(tmp_path, family="tables", mapping=str(mapping))
    assert "unknown key 'imagee'. Did you mean 'image'?" in wrong
    mapping.write_text("prompt: '{choices}'\n")
    assert "prompt must hold {question}" in refusal(tmp_path, family="tables", mapping=str(mapping))


@pytest.mark.parametrize("options", [{"family": "tables"}, {"family": "llava", "mapping": "x"}])
def test_only_tables_take_a_mapping(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="the family tables needs a mapping"):
        ConversionJob.model_validate({"input": "a", "output": "b"} | options)


def test_the_plan_tells_what_is_read(tmp_path: Path) -> None:
    job, expected = make_job("webdataset", tmp_path)
    plan = check_conversion(job)
    assert isinstance(plan, Plan)
    told = plan.describe()
    assert (told["rows"], told["files"], told["done"]) == (len(expected), 2, 0)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_in_one_line_and_nothing_is_lost(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashvl.data.ledger.tables.BYTES_PER_FILE", 1)
    job, expected = make_job("onevision", tmp_path)
    write, num_left = Location.write, [4]  # the lists of files, and two files of rows

    def fill(location: Location, data: bytes) -> None:
        num_left[0] -= 1
        if num_left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(location, data)

    with monkeypatch.context() as disk:
        disk.setattr(Location, "write", fill)
        with pytest.raises(FlashVLError, match=r"No space left on device\); it holds \d rows"):
            convert(job)
    assert 0 < len(outcome_of_part(job)) < len(expected)
    assert convert(job).input == len(outcome_of(job)) == len(expected)
