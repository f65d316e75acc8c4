"""What the tests of this folder share: the plainest job's captions, and a store."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from flashvl.batch.job import run_caption_job
from tests.support.jobs import NUM_ROWS, PICTURES, captions_of, make_job
from tests.support.stores import s3_bucket


@pytest.fixture(scope="session")
def plain(
    ray_cluster: None, tiny_random: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, str]:
    """The captions of `PICTURES`, by row."""
    folder = tmp_path_factory.mktemp("plain")
    pq.write_table(pa.table({"id": range(NUM_ROWS), "image": PICTURES}), folder / "in.parquet")
    run_caption_job(make_job(tiny_random, folder / "in.parquet", folder / "out"))
    captions = captions_of(folder / "out")
    assert len(set(captions.values())) > NUM_ROWS // 2
    return captions


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URI of a bucket on a real S3 server, with a `{}` for the key."""
    with s3_bucket() as (_, uri):
        yield uri
