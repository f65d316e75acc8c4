"""Inputs of captioning jobs, the jobs themselves, and what they have written."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flashvl.batch.config import CaptionJob
from tests.support.images import blobs, encode


def picture(seed: int, file_format: str = "PNG") -> bytes:
    """An image file of `blobs`."""
    return encode(blobs(seed), file_format)


NUM_ROWS = 12
PICTURES = [picture(seed) for seed in range(NUM_ROWS)]


class Interrupted(Exception):
    """Raised by a progress callback to end a job before its last row."""


def make_job(model: Path, source: Any, output: Any, **options: Any) -> CaptionJob:
    """A job with short answers in float32, so that a row's caption is the same in every batch."""
    values = {"dtype": "float32", "max_new_tokens": 4, "max_num_seqs": 8} | options
    return CaptionJob(input=str(source), output=str(output), model=str(model), **values)


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    """All rows of an output by their place in the input; each is there once."""
    found = [
        row
        for name in ("captions", "dead_letters")
        for row in pq.read_table(folder / name).to_pylist()
    ]
    by_row = {row["row"]: row for row in found}
    assert len(by_row) == len(found)
    return by_row


def captions_of(folder: Path) -> dict[int, str]:
    """The captions of an output without dead letters, by their place in the input."""
    return {place: row["caption"] for place, row in rows_of(folder).items()}


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    """A tar of `members`; a `mode` such as "w:gz" compresses it."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
