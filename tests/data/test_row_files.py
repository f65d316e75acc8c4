"""A file that cannot be read fails its row alone; a store that fails stops the job."""

import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from flashvl.data import row_files
from flashvl.data.row_files import read_row_file
from flashvl.data.storage import locate
from flashvl.errors import DataError, FlashVLError
from tests.support.stores import s3_bucket

LOCAL = locate("/").store
MAX_BYTES = 1000


def read(path: str | Path) -> bytes:
    return read_row_file(str(path), LOCAL, MAX_BYTES)


def refuse(path: str | Path, *said: str) -> None:
    with pytest.raises(DataError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    for words in said:
        assert words in message


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    file.write_bytes(b"pixels")
    return file


def test_reads_a_file_by_whatever_names_it_has(photo: Path) -> None:
    (photo.parent / "deep").mkdir()
    (photo.parent / "link").symlink_to(photo)
    odd = os.fsdecode(os.fsencode(photo.parent) + b"/gr\xfc\xdfe %20#?*.png")
    Path(odd).write_bytes(b"odd")
    for name in (photo, f"file://{photo}", photo.parent / "deep/../photo.png"):
        assert read(name) == b"pixels"
    assert read(photo.parent / "link") == b"pixels"
    assert read(odd) == b"odd"


def test_a_path_that_leads_nowhere(photo: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "none.png", "none.png", "No such file")
    refuse(photo / "inner.png", "Not a directory")
    refuse(tmp_path, "Is a directory")
    refuse(tmp_path / ("x" * 5000), "File name too long")
    refuse(f"{tmp_path}/{'x/' * 3000}a.png", "File name too long")
    refuse(f"{photo}\0", "null byte")
    (tmp_path / "loop").symlink_to("loop")
    refuse(tmp_path / "loop" / "a.png", "symbolic links")
    refuse(tmp_path / "\udcff\udcfe.png", r"\udcff")
    refuse("", "Is a directory")
    refuse("data:image/png;base64," + "iVBORw0KGgo" * 3000, "File name too long")


def test_what_is_no_regular_file_is_not_even_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.png"))
        for name in ("pipe.png", "socket.png"):
            refuse(tmp_path / name, "not a regular file")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for path in ("/dev/zero", "/dev/stdin", "/dev/tty", tmp_path / "zero.png"):
        refuse(path)
    for path in ("/proc/self/environ", "/proc/kmsg", "/proc/self/mem", "/sys/kernel/mm/ksm/run"):
        refuse(path)


def test_nothing_is_read_of_a_large_file(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**40)
    refuse(tmp_path / "large.png", "1099511627776 bytes", f"max_image_bytes={MAX_BYTES}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(photo: Path) -> None:
    photo.chmod(0)
    refuse(photo, "Permission denied")


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "http://[",
            "http://[::1",
            "://",
            "://x",
            "s3://",
            "gopher://x/1.png",
            "file://nowhere/x",
        ),
        *(
            "hdfs://nowhere/x.png",
            "C://x",
            "s3:// /x",
            "s3://b\0/x",
            pytest.param("s3://b/\udcff", marks=pytest.mark.long),
            "x://\n",
        ),
        *(
            "mock://a/b.png",
            "https://example.invalid/x.png",
            "abfs://",
            "gs://",
            "gs:///x",
            "hdfs://",
            "1://a",
        ),
    ],
)
def test_a_uri_of_nothing(uri: str) -> None:
    refuse(uri)


@settings(max_examples=300, deadline=None)
@given(path=st.text() | st.text("./\\:%~-aé\0\n\udcff ?*[", max_size=300))
@example("%")
@example("C:\\Users\\a.png")
@example("../../../../../..")
@example("~")
@example("file:")
@example("file://")
def test_a_path_of_any_text_is_read_or_refused(path: str) -> None:
    if "://" in path:
        path = path.replace("s3://", "x://").replace("gs://", "x://")
    try:
        read(f"/nowhere/{path}")
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE])
def test_a_broken_disk_stops_the_job(
    number: int, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken disk is simulated by a system call that fails as with one."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(FlashVLError, match="store of .* cannot be read any more") as error:
        read(photo)
    assert not isinstance(error.value, DataError)


@pytest.fixture
def s3() -> Iterator[tuple[ThreadedMotoServer, str]]:
    """A real S3 server with two objects, and the URI of its bucket with a `{}` for the key."""
    with s3_bucket() as (server, uri):
        store, _ = pyarrow.fs.FileSystem.from_uri(uri.format("x"))
        for name, data in (("deep/a.png", b"pixels"), ("large.png", bytes(MAX_BYTES + 1))):
            with store.open_output_stream(f"bucket/{name}") as file:
                file.write(data)
        yield server, uri


def test_objects_of_a_store(s3: tuple[ThreadedMotoServer, str]) -> None:
    _, uri = s3
    assert read(uri.format("deep/a.png")) == b"pixels"
    refuse(uri.format("none.png"), "none.png")
    refuse(uri.format("deep"))
    refuse(uri.format("large.png"), f"max_image_bytes={MAX_BYTES}")
    refuse(uri.format("x" * 5000))
    refuse(re.sub("@bucket", "@no-such-bucket", uri.format("a.png")))
    table = locate(uri.format("deep"))
    assert read_row_file("bucket/deep/../deep/a.png", table.store, MAX_BYTES) == b"pixels"
    for path in (
        "bucket/../../../x",
        "/",
        "",
        "bucket",
        "bucket/\0",
        "bucket/\udcff",
        "//a",
        "b%/",
    ):
        with pytest.raises(DataError):
            read_row_file(path, table.store, MAX_BYTES)


@pytest.mark.long
def test_a_store_that_went_away_stops_the_job(s3: tuple[ThreadedMotoServer, str]) -> None:
    server, uri = s3
    assert read(uri.format("deep/a.png")) == b"pixels"
    table = locate(uri.format("deep"))
    server.stop()
    for path, store in ((uri.format("deep/a.png"), LOCAL), ("bucket/deep/a.png", table.store)):
        with pytest.raises(FlashVLError, match="cannot be read any more") as error:
            read_row_file(path, store, MAX_BYTES)
        assert not isinstance(error.value, DataError)


@pytest.mark.long
def test_a_store_that_never_answered_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row may name a false store; if all do, the share of dead letters stops the job."""
    monkeypatch.setattr(row_files, "_silent", {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"s3://k:s@bucket/{{}}.png?endpoint_override=http://127.0.0.1:{port}&region=us-east-1"
    refuse(uri.format(0), "NETWORK_CONNECTION")
    monkeypatch.setattr(row_files, "locate", None)  # it would fail with another error
    refuse(uri.format(1), "NETWORK_CONNECTION")
