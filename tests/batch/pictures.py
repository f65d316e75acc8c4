"""Small pictures, tables and jobs that the tests of this folder share."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from flashvl.batch.config import CaptionJob


def picture(seed: int, file_format: str = "PNG") -> bytes:
    """Blobs of colour: no two seeds look alike to a model."""
    blobs = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blobs).resize((60 + seed % 30, 50)).save(file, file_format)
    return file.getvalue()


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    """All rows of an output by their place; each is there once."""
    found = [
        row
        for name in ("captions", "dead_letters")
        for row in pq.read_table(folder / name).to_pylist()
    ]
    by_row = {row["row"]: row for row in found}
    assert len(by_row) == len(found)
    return by_row


NUM_ROWS = 12
PICTURES = [picture(seed) for seed in range(NUM_ROWS)]


def make_job(model: Path, source: Any, output: Any, **options: Any) -> CaptionJob:
    values = {"dtype": "float32", "max_new_tokens": 4, "max_num_seqs": 8} | options
    return CaptionJob(input=str(source), output=str(output), model=str(model), **values)


def captions_of(folder: Path) -> dict[int, str]:
    return {place: row["caption"] for place, row in rows_of(folder).items()}
