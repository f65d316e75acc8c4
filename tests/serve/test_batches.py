"""`/v1/batches`: whole jobs by HTTP, and paths that lead out of the allowed folders."""

import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from flashvl.data.storage import is_below
from tests.support.images import encode, noise


def write_table(path: Path, num_rows: int) -> Path:
    images = [encode(noise(row)) for row in range(num_rows)]
    pq.write_table(pa.table({"id": list(map(str, range(num_rows))), "image": images}), path)
    return path


def create(url: str, **request: Any) -> requests.Response:
    return requests.post(f"{url}/v1/batches", json=request, timeout=60)


def wait(url: str, batch_id: str, *statuses: str) -> dict[str, Any]:
    deadline_s = time.monotonic() + 200
    while True:
        batch = requests.get(f"{url}/v1/batches/{batch_id}", timeout=60).json()
        if batch["status"] in statuses:
            return batch
        assert batch["status"] in ("validating", "in_progress"), batch
        assert time.monotonic() < deadline_s, batch
        time.sleep(1)


def test_a_batch_is_captioned_listed_and_told_of(url: str, batch_root: Path) -> None:
    table = write_table(batch_root / "in.parquet", 20)
    made = create(url, input=str(table), output=str(batch_root / "out"), max_new_tokens=3)
    assert made.status_code == 200, made.text
    assert made.json()["request_counts"] == {"total": 20, "completed": 0, "failed": 0}
    batch = wait(url, made.json()["id"], "completed")
    assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    assert batch["created_at"] <= batch["completed_at"]
    rows = pq.read_table(batch_root / "out" / "captions").to_pylist()
    assert sorted(int(row["id"]) for row in rows) == list(range(20))
    listed = requests.get(f"{url}/v1/batches", timeout=60).json()["data"]
    assert [each["id"] for each in listed if each["status"] == "completed"] == [batch["id"]]

    again = create(url, input=str(table), output=str(batch_root / "out"), max_new_tokens=4)
    assert again.status_code == 400 and "max_new_tokens was 3" in again.json()["error"]["message"]


def test_a_batch_is_cancelled(url: str, batch_root: Path) -> None:
    table = write_table(batch_root / "long.parquet", 400)
    made = create(url, input=str(table), output=str(batch_root / "long"), max_new_tokens=400)
    batch_id = made.json()["id"]
    wait(url, batch_id, "in_progress")
    requests.post(f"{url}/v1/batches/{batch_id}/cancel", timeout=60).raise_for_status()
    assert wait(url, batch_id, "cancelled")["completed_at"] is not None


def test_a_batch_that_cannot_begin_or_is_not_there(url: str, batch_root: Path) -> None:
    refused = create(url, input=str(batch_root / "none"), output=str(batch_root / "x"))
    assert refused.status_code == 400 and "does not exist" in refused.json()["error"]["message"]
    for path in ("nothing", "batch-0", "..", "raysubmit_1", "%23", "%3F", "a%2Fb", "a%23b"):
        answer = requests.get(f"{url}/v1/batches/{path}", timeout=60)
        assert answer.status_code == 404, (path, answer.text)
        assert requests.post(f"{url}/v1/batches/{path}/cancel", timeout=60).status_code == 404


def test_paths_lead_nowhere_else(url: str, batch_root: Path, tmp_path: Path) -> None:
    inside = str(write_table(batch_root / "good.parquet", 2))
    outside = str(write_table(tmp_path / "secret.parquet", 2))
    link = batch_root / "link"
    link.symlink_to(tmp_path)
    for bad in (
        outside,
        f"{batch_root}/../{tmp_path.name}/secret.parquet",
        f"{link}/secret.parquet",
        f"file://{outside}",
        f"{batch_root}-sibling",
        "secret.parquet",
        "s3://bucket/table",
        "/",
        "/etc/passwd",
        f"{batch_root}/*/../../{tmp_path.name}/*.parquet",
        f"--output={batch_root}",
    ):
        for request in (
            {"input": bad, "output": str(batch_root / "o")},
            {"input": inside, "output": bad},
        ):
            answer = create(url, **request)
            assert answer.status_code == 400, (request, answer.text)
            assert "batch_roots" in answer.json()["error"]["message"], answer.text


def test_a_table_that_names_files_reads_none_of_them(url: str, batch_root: Path) -> None:
    """Otherwise a client could learn of any picture, or the first bytes of any file, on a node."""
    table = batch_root / "paths.parquet"
    pq.write_table(pa.table({"image": ["/etc/passwd", str(batch_root / "x.png")]}), table)
    refused = create(url, input=str(table), output=str(batch_root / "paths"))
    assert refused.status_code == 400 and "may not be followed" in refused.text
    hugging_face = pa.array(
        [{"bytes": None, "path": "/etc/passwd"}, {"bytes": encode(noise(1)), "path": "x.png"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": hugging_face}), table)
    made = create(url, input=str(table), output=str(batch_root / "paths"), max_new_tokens=2)
    batch = wait(url, made.json()["id"], "completed")
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (dead,) = pq.read_table(batch_root / "paths" / "dead_letters").to_pylist()
    assert "null" in dead["reason"] and "root:" not in dead["reason"]


@given(
    steps=st.lists(st.sampled_from(["..", ".", "", "a", "root", "b"]), max_size=8),
    store=st.sampled_from(["", "file://", "s3://bucket"]),
)
def test_below_is_below_whatever_the_steps(steps: list[str], store: str) -> None:
    """Our check of paths, against the library's own normalisation."""
    path = "/root/" + "/".join(steps)
    normal = os.path.normpath(path)
    expected = normal == "/root" or normal.startswith("/root/")
    assert is_below(store + path, [store + "/root"]) == expected
    assert not is_below(store + path, [store + "/root/deeper/than/that/ever/goes/x/y/z/1/2"])


@pytest.mark.parametrize(
    ("place", "root", "expected"),
    [
        ("s3://bucket/a/b", "s3://bucket/a", True),
        ("s3://bucket/ab", "s3://bucket/a", False),
        ("s3://other/a/b", "s3://bucket/a", False),
        ("gs://bucket/a/b", "s3://bucket/a", False),
        ("s3://bucket/a/b?endpoint_override=evil.example", "s3://bucket/a", False),
        ("s3://key:secret@bucket/a/b", "s3://bucket/a", False),
        ("s3://bucket/a", "s3://bucket/", True),
        ("/a/b", "/", True),
    ],
)
def test_stores_are_told_apart(place: str, root: str, expected: bool) -> None:
    assert is_below(place, [root]) == expected
