"""What the tests of this folder share: the plainest job's captions, and a store."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from flashvl.batch.job import run_caption_job
from tests.batch.pictures import NUM_ROWS, PICTURES, captions_of, make_job


@pytest.fixture(scope="session")
def plain(
    ray_cluster: None, tiny_random: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, str]:
    """The captions of `PICTURES` by their place."""
    folder = tmp_path_factory.mktemp("plain")
    pq.write_table(pa.table({"id": range(NUM_ROWS), "image": PICTURES}), folder / "in.parquet")
    run_caption_job(make_job(tiny_random, folder / "in.parquet", folder / "out"))
    captions = captions_of(folder / "out")
    assert len(set(captions.values())) > NUM_ROWS // 2
    return captions


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket of a real S3 server: its URI and its query."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    query = f"endpoint_override=http://127.0.0.1:{port}&region=us-east-1"
    uri = f"s3://key:secret@bucket/{{}}?{query}&allow_bucket_creation=true"
    store, _ = pa.fs.FileSystem.from_uri(uri.format("x"))
    store.create_dir("bucket")
    yield uri
    server.stop()
