"""Captioning jobs: no row is lost or doubled, captions are the engine's, refusals leave nothing."""

import asyncio
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvl.batch.captioner import CAPTIONED, Captioner
from flashvl.batch.config import CaptionJob
from flashvl.batch.decoding import tile_images
from flashvl.batch.gate import Gate
from flashvl.batch.job import Summary, run_caption_job
from flashvl.batch.outputs import RESULTS
from flashvl.config import validate
from flashvl.data.images import decode_image
from flashvl.data.inputs.find import find_source
from flashvl.data.inputs.images import IMAGE_SUFFIXES
from flashvl.data.inputs.parquet import ParquetFiles
from flashvl.data.ledger.outputs import OutputFolder
from flashvl.data.limits import ImageLimits
from flashvl.data.schema import CAPTIONS, DEAD_LETTERS
from flashvl.data.storage import locate
from flashvl.engine import Engine, Request
from flashvl.errors import CheckpointError, ConfigError
from tests.support.jobs import picture

MAX_NEW_TOKENS = 6
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LIMITS = ImageLimits(max_image_bytes=20_000)


def table(ids: list[Any], images: list[bytes | None], image_type: pa.DataType) -> pa.Table:
    if pa.types.is_struct(image_type):
        rows: list[Any] = [{"bytes": image, "path": "x.png"} for image in images]
    else:
        rows = images
    return pa.table({"id": pa.array(ids), "image": pa.array(rows, image_type)})


def by_row(row: dict[str, Any]) -> int:
    return row["row"]


def read(folder: Path) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """Captions, dead letters and summary of a finished job, each checked against its schema."""
    captions, dead = (pq.read_table(folder / name) for name in ("captions", "dead_letters"))
    assert captions.schema.equals(CAPTIONS) and dead.schema.equals(DEAD_LETTERS)
    summary = json.loads((folder / "_summary.json").read_text())
    assert summary["written"] == captions.num_rows and summary["dead"] == dead.num_rows
    assert summary["input"] == summary["written"] + summary["dead"]
    assert not [file for file in folder.rglob(".*")]  # nothing unfinished is left
    return captions, dead, summary


@pytest.fixture(scope="module")
def engine(tiny_random: Path) -> Engine:
    return Engine.from_pretrained(tiny_random, "float32")


def one_by_one(engine: Engine, image: bytes, prompt: str = "Describe the image.") -> dict[str, Any]:
    """The caption that the engine alone gives to the decoded picture."""
    request = Request(
        messages=[{"role": "user", "content": f"<image>\n{prompt}"}],
        images=[decode_image(image)],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    (completion,) = engine.generate([request])
    return {
        "caption": completion.text,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def job(tiny_random: Path, source: Path | str, output: Path, **options: Any) -> CaptionJob:
    values = {
        "model": str(tiny_random),
        "dtype": "float32",
        "max_new_tokens": MAX_NEW_TOKENS,
    } | options
    return CaptionJob(input=str(source), output=str(output), **values)


# Whole jobs


def test_captions_what_it_can_of_two_files_and_accounts_for_the_rest(
    ray_cluster: None, tiny_random: Path, engine: Engine, tmp_path: Path
) -> None:
    """Integer ids, images as Hugging Face stores them, a row group cut into many batches."""
    images: list[bytes | None] = [picture(seed) for seed in range(40)]
    bad = {3: None, 11: b"", 17: picture(17)[:60], 39: b"no picture"}
    images = [bad.get(number, image) for number, image in enumerate(images)]
    ids: list[int | None] = [*range(40)]
    ids[20] = None  # a good picture that nobody could find again
    ids[21] = 22  # twice the same id: both are rows
    parts = tmp_path / "in [1]"  # a folder's name is not read as a glob
    parts.mkdir()
    for name, rows in (("a", slice(0, 25)), ("b", slice(25, 40))):
        pq.write_table(table(ids[rows], images[rows], HF_IMAGE), parts / f"{name}.parquet")

    progress: list[tuple[int, int]] = []
    run_caption_job(
        job(tiny_random, parts, tmp_path / "out", max_num_seqs=7),
        on_progress=lambda done, total, note="": progress.append((done, total)),
    )

    captions, dead, summary = read(tmp_path / "out")
    assert summary["input"] == 40
    assert Counter(captions["id"].to_pylist()) + Counter(dead["id"].to_pylist()) == Counter(
        None if row_id is None else str(row_id) for row_id in ids
    )
    steps = {row["id"]: row["step"] for row in dead.to_pylist()}
    assert steps == {"3": "read", "11": "decode", "17": "decode", "39": "decode", None: "read"}
    wanted = [
        {"id": str(row_id), "row": row, **one_by_one(engine, image)}
        for row, (row_id, image) in enumerate(zip(ids, images, strict=True))
        if row_id is not None and row_id not in bad and image is not None
    ]
    assert (
        len({row["caption"] for row in wanted}) > len(wanted) / 2
    )  # otherwise these captions prove little
    assert sorted(captions.to_pylist(), key=by_row) == wanted
    assert set(dead["row"].to_pylist()) == {3, 11, 17, 20, 39}
    done = [done for done, _ in progress]
    assert done == sorted(done) and progress[-1] == (40, 40) and len(progress) > 2


def test_captions_a_folder_of_images(
    ray_cluster: None, tiny_random: Path, engine: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    (folder / "2024 summer" / "deep").mkdir(parents=True)
    images = {
        "a.png": picture(1),
        "B.JPG": picture(2, "JPEG"),
        "2024 summer/c%20d.webp": picture(3, "WEBP"),
        "2024 summer/deep/e#f.gif": picture(4, "GIF"),
    }
    for name, data in images.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("not an image, and not named as one")
    (folder / "._a.png").write_bytes(b"what macOS leaves beside a.png")
    (folder / "letter.jpg").write_text("a letter")
    (folder / "large.bmp").write_bytes(bytes(20_001))
    (folder / "gone.png").write_bytes(picture(5))
    source = find_source(str(folder))
    assert source.num_rows == 7

    run_caption_job(
        job(tiny_random, folder, tmp_path / "out", prompt="What is it?", image_limits=LIMITS)
    )

    captions, dead, _ = read(tmp_path / "out")
    images["gone.png"] = picture(5)
    wanted = {name: one_by_one(engine, data, "What is it?") for name, data in images.items()}
    rows = captions.to_pylist()
    assert [Path(source.files[row.pop("row")].path).name for row in rows] == [
        Path(r["id"]).name for r in rows
    ]
    assert {row.pop("id"): row for row in rows} == wanted
    steps = {row["id"]: row["step"] for row in dead.to_pylist()}
    assert steps == {"letter.jpg": "decode", "large.bmp": "read"}


def test_an_engine_that_dies_costs_no_row_and_doubles_none(
    ray_cluster: None, tiny_random: Path, tmp_path: Path
) -> None:
    ids = [f"row {number}" for number in range(120)]
    images: list[bytes | None] = [picture(number) for number in range(120)]
    pq.write_table(table(ids, images, pa.binary()), tmp_path / "in.parquet")
    killed: list[int] = []

    def kill_the_engine(done: int, total: int, note: str = "") -> None:
        if not killed:
            killed.extend(descendants_named("ray::MapWorker(MapBatches(Captioner)"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    run_caption_job(
        job(tiny_random, tmp_path / "in.parquet", tmp_path / "out", max_num_seqs=4), kill_the_engine
    )

    assert killed
    captions, dead, _ = read(tmp_path / "out")
    assert sorted(captions["id"].to_pylist()) == sorted(ids)
    assert dead.num_rows == 0


def descendants_named(title: str) -> list[int]:
    """This process's own descendants whose title begins with `title`."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
            titles[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue  # it ended meanwhile

    def is_ours(pid: int) -> bool:
        while pid not in (0, 1, os.getpid()):
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return [pid for pid, text in titles.items() if text.startswith(title) and is_ours(pid)]


def test_an_empty_table_gives_empty_tables(
    ray_cluster: None, tiny_random: Path, tmp_path: Path
) -> None:
    pq.write_table(table([], [], pa.binary()).cast(IMAGE_TABLE), tmp_path / "in.parquet")
    summary = run_caption_job(job(tiny_random, tmp_path / "in.parquet", tmp_path / "out"))
    captions, dead, written = read(tmp_path / "out")
    assert captions.num_rows == dead.num_rows == 0
    assert Summary.model_validate(written) == summary


IMAGE_TABLE = pa.schema([("id", pa.string()), ("image", pa.binary())])


def test_a_broken_machine_stops_the_job_with_its_own_error(
    ray_cluster: None, tiny_random: Path, tmp_path: Path
) -> None:
    pq.write_table(table(["a"], [picture(0)], pa.binary()), tmp_path / "in.parquet")
    broken = tmp_path / "model"
    shutil.copytree(tiny_random, broken)
    config = json.loads((broken / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5]  # which no check before the job looks at
    (broken / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="invalid for input of size 2"):
        run_caption_job(job(broken, tmp_path / "in.parquet", tmp_path / "out"))
    assert not (tmp_path / "out" / "_summary.json").exists()


def test_a_model_whose_weights_do_not_fit_is_one_error_of_the_user(
    ray_cluster: None, tiny_random: Path, tmp_path: Path
) -> None:
    pq.write_table(table(["a"], [picture(0)], pa.binary()), tmp_path / "in.parquet")
    broken = tmp_path / "model"
    shutil.copytree(tiny_random, broken)
    weights = safetensors.numpy.load_file(broken / "model.safetensors")
    del weights["model.multi_modal_projector.linear_2.weight"]
    safetensors.numpy.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing weight .*linear_2.weight") as error:
        run_caption_job(job(broken, tmp_path / "in.parquet", tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_refuses_more_engines_than_the_cluster_can_feed(
    ray_cluster: None, tiny_random: Path, tmp_path: Path
) -> None:
    pq.write_table(table(["a"], [picture(0)], pa.binary()), tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match=r"replicas \(4\) must be less than .* CPUs \(4\)"):
        run_caption_job(job(tiny_random, tmp_path / "in.parquet", tmp_path / "out", replicas="4"))
    assert not (tmp_path / "out").exists()


# The steps, without Ray

ROW = st.sampled_from(("good", "null image", "no image", "null id"))


@pytest.fixture(scope="module")
def captioner(ray_cluster: None, tiny_random: Path) -> Captioner:
    return Captioner(
        job=job(tiny_random, "none", Path("none"), max_new_tokens=2, max_num_seqs=8),
        gate=ray.remote(num_cpus=0)(Gate).remote(),
    )


@settings(max_examples=15, deadline=None)
@given(kinds=st.lists(ROW, max_size=12), batch_size=st.integers(1, 5))
def test_every_row_comes_out_once_whatever_the_mixture(
    captioner: Captioner,
    tiny_random: Path,
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[str],
    batch_size: int,
) -> None:
    ids = [None if kind == "null id" else str(number) for number, kind in enumerate(kinds)]
    contents = {"null image": None, "no image": b"no image"}
    images = [contents.get(kind, picture(number)) for number, kind in enumerate(kinds)]
    rows = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "row": pa.array(range(len(ids)), pa.int64()),
            "image": pa.array(images, pa.large_binary()),
            "path": pa.nulls(len(ids), pa.binary()),
        }
    )

    folder = tmp_path_factory.mktemp("out") / "captions"
    output = OutputFolder(locate(folder), len(ids), RESULTS, pa.schema([]))
    for batch in rows.to_batches(max_chunksize=batch_size):
        tiled = tile(pa.Table.from_batches([batch]), tiny_random)
        answered = asyncio.run(captioner(tiled))
        output.write(answered)
        assert output.write(answered).num_rows == 0  # as happens when Ray repeats a task
    output.finish_rows()

    wanted = {str(number) for number, kind in enumerate(kinds) if kind == "good"}
    captions = pq.read_table(folder / "captions")
    assert output.results.num_rows == len(wanted)
    assert output.dead_letters.num_rows == len(kinds) - len(wanted)
    letters = pq.read_table(folder / "dead_letters")
    assert set(captions["id"].to_pylist()) == wanted and captions.num_rows == len(wanted)
    assert [row["id"] for row in letters.to_pylist()] == [
        row_id for row_id, kind in zip(ids, kinds, strict=True) if kind != "good"
    ]
    assert all(row["reason"] and row["step"] for row in letters.to_pylist())


def tile(rows: pa.Table, model: Path) -> pa.Table:
    return tile_images(rows, model=str(model), image_limits=ImageLimits(), store=locate("/").store)


def test_a_file_that_is_gone_when_its_turn_comes_is_a_dead_letter(
    tiny_random: Path, tmp_path: Path
) -> None:
    rows = pa.table(
        {
            "id": ["a.png"],
            "row": [0],
            "image": pa.nulls(1, pa.large_binary()),
            "path": [os.fsencode(tmp_path / "a.png")],
        }
    )
    (row,) = tile(rows, tiny_random).to_pylist()
    assert row["step"] == "read" and "No such file" in row["reason"] and row["tiles"] is None
    assert row["error"] == "FileNotFoundError"


def test_output_is_cut_into_files_that_hold_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashvl.data.ledger.tables.BYTES_PER_FILE", 1000)
    output = OutputFolder(locate(tmp_path / "out"), 100, RESULTS, pa.schema([]))
    for first in range(0, 100, 4):
        rows = [
            {"row": row, "id": str(row), "caption": "c" * 50} for row in range(first, first + 4)
        ]
        output.write(pa.Table.from_pylist(rows, schema=CAPTIONED))
    output.finish_rows()
    assert (output.results.num_rows, output.dead_letters.num_rows) == (100, 0)
    files = sorted((tmp_path / "out" / "captions").iterdir())
    assert [file.name for file in files[:2]] == ["part-00000.parquet", "part-00001.parquet"]
    sizes = [pq.read_metadata(file).num_rows for file in files]
    assert sum(sizes) == 100 and len(sizes) > 5 and max(sizes) - min(sizes[:-1]) <= 4
    assert pq.read_table(files)["id"].to_pylist() == [str(number) for number in range(100)]


# Refusals


def refuse(tiny_random: Path, source: Path | str, output: Path, *said: str, **options: Any) -> None:
    """Check that the job is refused, without Ray, in one line that holds all of `said`."""
    before = sorted(output.parent.rglob("*")) if output.parent.is_dir() else []
    with pytest.raises(ConfigError) as error:
        run_caption_job(job(tiny_random, source, output, **options))
    message = str(error.value)
    assert "\n" not in message
    for words in said:
        assert words in message
    assert (sorted(output.parent.rglob("*")) if output.parent.is_dir() else []) == before


@pytest.fixture
def one_row(tmp_path: Path) -> Path:
    path = tmp_path / "one.parquet"
    pq.write_table(table(["a"], [picture(0)], pa.binary()), path)
    return path


@pytest.mark.parametrize("name", ["nowhere", "nowhere.parquet", "nowhere/*.parquet"])
def test_refuses_an_input_that_is_not_there(tiny_random: Path, tmp_path: Path, name: str) -> None:
    refuse(tiny_random, tmp_path / name, tmp_path / "out", name, "does not exist", "name a Parquet")


def test_refuses_a_folder_without_images(tiny_random: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "_metadata.parquet").write_text("left out")
    refuse(tiny_random, folder, tmp_path / "out", str(folder), "no image file", "jpeg", "name a")


def test_refuses_a_file_that_is_no_parquet_by_name_or_content(
    tiny_random: Path, tmp_path: Path, one_row: Path
) -> None:
    (tmp_path / "a.csv").write_text("id,image\n")
    refuse(tiny_random, tmp_path / "a.csv", tmp_path / "out", "a.csv", ".parquet")
    (tmp_path / "cut.parquet").write_bytes(one_row.read_bytes()[:-10])
    refuse(tiny_random, tmp_path / "*.parquet", tmp_path / "out", "cut.parquet", "not a readable")


def test_refuses_tables_without_images_and_tables_that_differ(
    tiny_random: Path, tmp_path: Path, one_row: Path
) -> None:
    other = tmp_path / "two.parquet"
    pq.write_table(pa.table({"id": ["b"], "url": ["b.png"]}), other)
    refuse(tiny_random, tmp_path / "*.parquet", tmp_path / "out", str(other), "'image'", "url")
    pq.write_table(table([7], [picture(0)], pa.binary()), other)
    refuse(tiny_random, tmp_path / "*.parquet", tmp_path / "out", str(other), "int64", "one schema")


def test_refuses_to_overwrite(tiny_random: Path, tmp_path: Path, one_row: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    refuse(tiny_random, one_row, output, str(output), "not empty", "another folder or remove it")
    refuse(tiny_random, one_row, output / "mine.txt", "mine.txt is a file", "name a folder")


def test_refuses_an_output_that_cannot_be_written(
    ray_cluster: None, tiny_random: Path, tmp_path: Path, one_row: Path
) -> None:
    refuse(tiny_random, one_row, one_row / "out", "cannot be written", "name another folder")
    refuse(tiny_random, one_row, Path("/proc/nowhere/out"), "/proc/nowhere/out cannot be written")


def test_refuses_a_folder_that_is_no_model(tmp_path: Path, one_row: Path) -> None:
    for model in ("no_such_model", str(tmp_path)):
        with pytest.raises(CheckpointError, match="name a Flash-VL folder"):
            run_caption_job(CaptionJob(input=str(one_row), output=tmp_path / "out", model=model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": "<image> what?"}, "must not hold <image>"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_num_seq": 1}, "Did you mean 'max_num_seqs'"),
    ],
)
def test_refuses_bad_options(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(CaptionJob, {"input": "a", "output": "b"} | values, source="caption")
    assert said in str(error.value)


def test_a_glob_names_files_in_any_depth(tmp_path: Path, one_row: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    shutil.copy(one_row, tmp_path / "deep" / "deeper" / "two.parquet")
    source = find_source(str(tmp_path / "**" / "*.parquet"))
    assert isinstance(source, ParquetFiles) and [table.row_groups for table in source.tables] == [
        [1],
        [1],
    ]
    assert {Path(file.path).name for file in source.files} == {"one.parquet", "two.parquet"}
    assert ".parquet" not in IMAGE_SUFFIXES
