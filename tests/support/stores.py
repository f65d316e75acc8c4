"""An S3 server on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs
from moto.server import ThreadedMotoServer


@contextmanager
def s3_bucket() -> Iterator[tuple[ThreadedMotoServer, str]]:
    """A real S3 server with an empty bucket, and the bucket's URI with a `{}` for the key."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    query = f"endpoint_override=http://127.0.0.1:{port}&region=us-east-1"
    uri = f"s3://key:secret@bucket/{{}}?{query}&allow_bucket_creation=true"
    store, _ = pyarrow.fs.FileSystem.from_uri(uri.format("x"))
    store.create_dir("bucket")
    yield server, uri
    server.stop()
