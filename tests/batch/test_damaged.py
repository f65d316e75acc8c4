"""Damaged image files through whole jobs: each is a caption or a dead letter, as decoding says."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashvl.batch.config import CaptionJob
from flashvl.batch.job import run_caption_job
from flashvl.data.images import decode_image
from flashvl.data.inputs.images import IMAGE_SUFFIXES
from flashvl.errors import DataError
from tests.support.damage import PICTURE, damaged_files
from tests.support.images import encode
from tests.support.jobs import rows_of

SUFFIXES = {
    "JPEG": ".jfif",
    "MPO": ".JPG",
    "PNG": ".png",
    "APNG": ".apng",
    "GIF": ".gif",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "AVIF": ".avif",
    "JPEG2000": ".jp2",
    "HEIF": ".HEIC",
}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_table(path: Path, files: dict[str, bytes]) -> Path:
    pq.write_table(pa.table({"id": list(files), "image": list(files.values())}), path)
    return path


def caption(source: Path, output: Path, files: dict[str, bytes], model: Path | str) -> None:
    """Every file is there once, and dead only for the reason for which it cannot be decoded."""
    run_caption_job(
        CaptionJob(
            input=str(source),
            output=str(output),
            model=str(model),
            dtype="float32",
            max_new_tokens=2,
            max_error_rate=1.0,
        )
    )
    summary = json.loads((output / "_summary.json").read_text())
    assert summary["input"] == summary["written"] + summary["dead"] == len(files)
    rows = {row["id"]: row for row in rows_of(output).values()}
    assert set(rows) == set(files)
    for name, data in files.items():
        try:
            decode_image(data)
            assert rows[name]["caption"] is not None, rows[name]
        except DataError as error:
            assert (rows[name]["step"], rows[name]["reason"]) == ("decode", str(error))


def damaged(number: int) -> dict[str, bytes]:
    files = {}
    for name, data in damaged_files(number, seed=number):
        place, kind = name.split(maxsplit=1)
        files[f"{place} {kind}{SUFFIXES[kind.split()[0]]}"] = data
    return files


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_folder_of_damaged_files(ray_cluster: None, tiny_random: Path, tmp_path: Path) -> None:
    files = damaged(90)
    files |= {f"whole{suffix}": encode(PICTURE, "JPEG") for suffix in IMAGE_SUFFIXES}
    files["telephone.HEIC"] = encode(PICTURE, "HEIF")
    caption(write_folder(tmp_path / "in", files), tmp_path / "out", files, tiny_random)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("write", [write_folder, write_table])
def test_2000_damaged_files(
    ray_cluster: None, write: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    files = damaged(2000)
    caption(write(tmp_path / "in.parquet", files), tmp_path / "out", files, "tiny")
