"""Every shape of image table and every store: captions are those of the plainest table."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from flashvl.batch.config import CaptionJob
from flashvl.batch.job import check_caption_job, run_caption_job
from flashvl.cli import app
from flashvl.data.images import decode_image
from flashvl.data.inputs.find import find_source
from flashvl.data.ledger.lock import held
from flashvl.data.storage import locate
from flashvl.engine import Engine, Request
from flashvl.errors import ConfigError, FlashVLError
from tests.batch.test_tables import KEPT
from tests.support.jobs import NUM_ROWS, PICTURES, captions_of, make_job, rows_of


def test_images_that_lie_elsewhere(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    """Paths are relative to the table, absolute or URIs; a lost file is a dead letter."""
    (tmp_path / "pictures").mkdir()
    paths = []
    for row, data in enumerate(PICTURES):
        file = tmp_path / "pictures" / f"{row}.png"
        file.write_bytes(data)
        paths.append((f"pictures/{row}.png", str(file), f"file://{file}")[row % 3])
    paths += ["pictures/lost.png", None, "gopher://pictures/1.png", "pictures"]
    pq.write_table(pa.table({"image": paths}), tmp_path / "in.parquet")
    run_caption_job(make_job(tiny_random, tmp_path / "in.parquet", tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    assert {place: rows[place]["caption"] for place in range(NUM_ROWS)} == plain
    assert rows[3]["id"] == "in.parquet:0:3"
    dead = [rows[place] for place in range(NUM_ROWS, NUM_ROWS + 4)]
    assert [row["step"] for row in dead] == ["read", "decode", "read", "read"]
    assert [row["error"] for row in dead] == [
        "FileNotFoundError",
        "DataError",
        "ConfigError",
        "IsADirectoryError",
    ]
    assert "pictures/lost.png" in dead[0]["reason"]


def test_columns_that_are_kept_prompts_of_rows_and_partitions(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    half = NUM_ROWS // 2
    for day, rows in (("1", range(half)), ("2", range(half, NUM_ROWS))):
        folder = tmp_path / "in" / f"day={day}"
        folder.mkdir(parents=True)
        table = pa.table(
            {
                "key": [f"key {row}" for row in rows],
                "jpg": [PICTURES[row] for row in rows],
                "ask": ["Describe the image." if row else None for row in rows],
                "size": pa.array([{"w": row, "h": [row, 2]} for row in rows]),
            }
        )
        table = table.append_column(
            "ask2", pa.array(["Describe the image."] * (len(rows) - 1) + ["<image>"])
        )
        pq.write_table(table, folder / "x.parquet", row_group_size=4)
    job = make_job(
        tiny_random,
        tmp_path / "in",
        tmp_path / "out",
        id_column="key",
        prompt_column="ask2",
        keep=("size", "day"),
    )
    run_caption_job(job)
    rows = rows_of(tmp_path / "out")
    for place in range(NUM_ROWS):
        row = rows[place]
        assert row["id"] == f"key {place}" and row["size"] == {"w": place, "h": [place, 2]}
        assert row["day"] == ("1" if place < half else "2")
        if place in (half - 1, NUM_ROWS - 1):
            assert row["step"] == "caption" and "2 <image>" in row["reason"]
        else:
            assert row["caption"] == plain[place]
    job = make_job(tiny_random, tmp_path / "in", tmp_path / "out2", prompt_column="ask")
    run_caption_job(job)
    rows = rows_of(tmp_path / "out2")
    assert rows[0]["step"] == "read" and rows[0]["reason"].startswith("prompt is null")
    assert rows[half]["id"] == "day=2/x.parquet:0:0" and rows[half]["caption"] == plain[half]


def test_what_datasets_wrote_is_read_and_what_is_written_is_read_by_others(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    table = datasets.Dataset.from_dict(
        {"image": [Image.open(io.BytesIO(data)) for data in PICTURES]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    table.to_parquet(str(tmp_path / "in.parquet"))
    output = tmp_path / "out"
    run_caption_job(make_job(tiny_random, tmp_path / "in.parquet", output))
    assert captions_of(output) == plain
    wanted = [plain[place] for place in range(NUM_ROWS)]
    files = str(output / "captions" / "*.parquet")
    found = duckdb.sql(f"select caption from read_parquet('{files}') order by row").fetchall()
    assert [caption for (caption,) in found] == wanted
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.sort("row")["caption"][:] == wanted
    assert pd.read_parquet(output / "captions").sort_values("row").caption.tolist() == wanted


def test_several_images_a_row_and_what_is_kept_of_every_type(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    """All of a row's images are in one prompt; every column arrives as pyarrow reads it."""
    images = pa.array([PICTURES[:1], PICTURES[1:3], []], pa.list_(pa.binary()))
    columns = {f"k {name}": column for name, column in KEPT.items()}
    pq.write_table(pa.table({"image": images} | columns), tmp_path / "in.parquet")
    job = make_job(tiny_random, tmp_path / "in.parquet", tmp_path / "out", keep=tuple(columns))
    summary = run_caption_job(job)
    assert (summary.written, summary.dead) == (2, 1)
    request = Request(
        messages=[{"role": "user", "content": "<image>\n<image>\nDescribe the image."}],
        images=[decode_image(picture) for picture in PICTURES[1:3]],
        max_new_tokens=4,
    )
    (both,) = Engine.from_pretrained(tiny_random, "float32").generate([request])
    rows = rows_of(tmp_path / "out")
    assert rows[0]["caption"] == plain[0] and rows[1]["caption"] == both.text
    assert rows[2]["step"] == "read" and "no image" in rows[2]["reason"]
    wanted = pq.read_table(tmp_path / "in.parquet").select(list(columns))
    for name in ("captions", "dead_letters"):
        schema = pq.read_table(tmp_path / "out" / name).schema
        assert [schema.field(column).type for column in columns] == wanted.schema.types
    for place, row in enumerate(wanted.to_pylist()):
        assert {name: rows[place][name] for name in columns} == row


def test_damage_and_odd_paths_cost_their_rows_and_a_resume_doubles_none(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    for row, data in enumerate(PICTURES):
        (tmp_path / "pictures" / f"{row}.png").write_bytes(data)
    os.mkfifo(tmp_path / "pictures" / "pipe")
    paths = [f"pictures/{row}.png" for row in range(NUM_ROWS)]
    odd = [
        "pictures/0.png/x",
        "x" * 5000,
        "a\0b",
        "pictures/pipe",
        "/dev/zero",
        "http://[",
        "s3://",
    ]
    table = pa.table({"image": [*paths, *odd, *["x.png"] * 6]})
    options = {"compression": "none", "use_dictionary": False}
    file = tmp_path / "in.parquet"
    pq.write_table(table, file, row_group_size=NUM_ROWS + len(odd), **options)
    data = bytearray(file.read_bytes())
    start = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    data[start : start + 40] = bytes(40)
    file.write_bytes(data)
    job = make_job(tiny_random, file, tmp_path / "out", max_error_rate=1.0, max_rows=16)
    run_caption_job(job)
    summary = run_caption_job(job.model_copy(update={"max_rows": None}))
    assert (summary.written, summary.dead) == (NUM_ROWS, len(odd) + 6)
    rows = rows_of(tmp_path / "out")
    assert {place: rows[place]["caption"] for place in range(NUM_ROWS)} == plain
    for place in range(NUM_ROWS, NUM_ROWS + len(odd)):
        assert rows[place]["step"] == "read" and len(rows[place]["reason"]) < 700
    for place in range(NUM_ROWS + len(odd), len(rows)):
        assert rows[place]["reason"].startswith(f"{file}: row group 1 is damaged")


def test_reads_from_s3_and_writes_to_it(
    plain: dict[int, str], tiny_random: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"id": range(NUM_ROWS), "image": PICTURES})
    store, _ = pa.fs.FileSystem.from_uri(s3.format("in"))
    with store.open_output_stream("bucket/in/a b#1.parquet") as file:
        pq.write_table(table, file)
    for row, data in enumerate(PICTURES):
        with store.open_output_stream(f"bucket/pictures/{row}.png") as file:
            file.write(data)
    with store.open_output_stream("bucket/paths/in.parquet") as file:
        pq.write_table(pa.table({"image": [f"../pictures/{n}.png" for n in range(12)]}), file)

    job = make_job(tiny_random, s3.format("in/*.parquet"), s3.format("out"))
    summary = run_caption_job(job)
    assert summary.input == summary.written == NUM_ROWS
    assert run_caption_job(job) == summary
    found = pq.read_table("bucket/out/captions", filesystem=store).sort_by("row")
    assert found["caption"].to_pylist() == [plain[place] for place in range(NUM_ROWS)]
    assert b"captions" in store.open_input_file("bucket/out/report.html").read()
    with pytest.raises(ConfigError, match="max_new_tokens was 4 and is 5"):
        run_caption_job(job.model_copy(update={"max_new_tokens": 5}))
    run_caption_job(job.model_copy(update={"max_new_tokens": 5, "restart": True}))
    with held(locate(job.output)), pytest.raises(ConfigError, match="another job is running"):
        run_caption_job(job.model_copy(update={"restart": True}))

    source = find_source(s3.format("pictures"))
    assert source.num_rows == NUM_ROWS
    job = make_job(tiny_random, s3.format("pictures"), s3.format("out2"))
    assert run_caption_job(job).written == NUM_ROWS


def test_a_trial_goes_on_with_the_rest(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    table = pa.table({"id": ["a", "b"] * 6, "image": PICTURES})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    job = make_job(tiny_random, tmp_path / "in.parquet", tmp_path / "out", max_rows=7)
    summary = run_caption_job(job)
    assert (summary.input, summary.written, summary.duplicate_ids) == (7, 7, 5)
    assert set(rows_of(tmp_path / "out")) == set(range(7))
    assert run_caption_job(job) == summary
    assert check_caption_job(job).describe()["done"] == 7
    with pytest.raises(ConfigError, match=r"holds 7 rows, more than max_rows \(3\)"):
        run_caption_job(job.model_copy(update={"max_rows": 3}))
    summary = run_caption_job(job.model_copy(update={"max_rows": None}))
    assert (summary.input, summary.duplicate_ids) == (NUM_ROWS, 10)
    assert captions_of(tmp_path / "out") == plain


def test_a_job_gone_wrong_stops(
    ray_cluster: None, tiny_random: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [b"no image"] * 4
    pq.write_table(pa.table({"image": images}), tmp_path / "bad.parquet")
    job = make_job(tiny_random, tmp_path / "bad.parquet", tmp_path / "out")
    with pytest.raises(FlashVLError, match="4 of 4 rows are dead letters.*known format"):
        run_caption_job(job)
    assert not (tmp_path / "out" / "_summary.json").exists()
    summary = run_caption_job(job.model_copy(update={"max_error_rate": 1.0}))
    assert (summary.input, summary.dead) == (4, 4)

    monkeypatch.setattr("flashvl.data.ledger.work.MIN_ROWS_OF_RATE", 20)
    images = [b"no image"] * 40 + PICTURES * 20
    pq.write_table(pa.table({"image": images}), tmp_path / "some.parquet")
    job = make_job(tiny_random, tmp_path / "some.parquet", tmp_path / "out2", max_error_rate=0.1)
    with pytest.raises(FlashVLError, match=r"\d+ of \d+ rows are dead letters, more than"):
        run_caption_job(job)
    assert 0 < len(rows_of(tmp_path / "out2")) < len(images)  # the job stopped early
    summary = run_caption_job(job.model_copy(update={"max_error_rate": 1.0}))
    assert summary.dead == 40 and len(rows_of(tmp_path / "out2")) == len(images)


def test_refuses_a_prompt_that_no_row_could_be_asked(tiny_random: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PICTURES}), tmp_path / "in.parquet")
    job = make_job(tiny_random, tmp_path / "in.parquet", tmp_path / "out", prompt="why " * 25_000)
    with pytest.raises(ConfigError, match="prompt of .* tokens .* exceed the model's"):
        run_caption_job(job)
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_of_a_row_is_a_dead_letter(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    prompts = ["Describe the image."] * (NUM_ROWS - 1) + ["why " * 25_000]
    pq.write_table(pa.table({"image": PICTURES, "q": prompts}), tmp_path / "in.parquet")
    run_caption_job(
        make_job(tiny_random, tmp_path / "in.parquet", tmp_path / "out", prompt_column="q")
    )
    rows = rows_of(tmp_path / "out")
    last = rows.pop(NUM_ROWS - 1)
    assert last["step"] == "caption" and "exceed max_model_len" in last["reason"]
    assert all(row["caption"] == plain[place] for place, row in rows.items())


@pytest.mark.parametrize(
    ("uri", "said"),
    [("gopher://x/y", "s3://, gs://"), ("mailto:x", "does not exist")],
)
def test_refuses_a_store_that_nobody_knows(uri: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_source(uri)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_plan_is_printed_and_nothing_started(tiny_random: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PICTURES}), tmp_path / "in.parquet")
    command = ["caption", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out")]
    command += ["--model", str(tiny_random), "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "rows            12" in result.stdout and "group and row" in result.stdout
    result = CliRunner().invoke(app, [*command, "--json", "--max-rows", "5"])
    plan = json.loads(result.stdout)
    assert (plan["rows"], plan["done"]) == (5, 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_stops_the_job_and_loses_no_row(tiny_random: Path, tmp_path: Path) -> None:
    """Run the command itself on a disk of 60 KB, then on a disk with room."""
    pq.write_table(pa.table({"image": PICTURES * 40}), tmp_path / "in.parquet")
    (tmp_path / "out").mkdir()
    shell = (
        f"mount -t tmpfs -o size=60k none {tmp_path}/out || exit 77;"
        f" {sys.executable} -c 'import flashvl.data.ledger.tables as o; o.BYTES_PER_FILE = 1000;"
        f" from flashvl.cli import main; main()' caption {tmp_path}/in.parquet"
        f" --output {tmp_path}/out --model {tiny_random} --max-new-tokens 4;"
        f" code=$?; cp -r {tmp_path}/out {tmp_path}/saved; exit $code"
    )
    full = subprocess.run(["unshare", "-rm", "sh", "-c", shell], capture_output=True, text=True)
    if "unshare" in full.stderr or full.returncode == 77:
        pytest.skip("no right to mount a small disk")
    assert full.returncode == 2, full.stderr
    assert "No space left on device" in full.stderr and "run the same command again" in full.stderr
    saved = tmp_path / "saved"
    assert 0 < len(rows_of(saved)) < NUM_ROWS * 40
    assert not list(saved.rglob(".unfinished*"))
    run_caption_job(
        CaptionJob(
            input=str(tmp_path / "in.parquet"),
            output=str(saved),
            model=str(tiny_random),
            max_new_tokens=4,
        )
    )
    assert len(rows_of(saved)) == NUM_ROWS * 40
