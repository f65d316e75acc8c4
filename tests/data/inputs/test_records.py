"""Records of JSON arrays, JSON Lines, Parquet and tars are read whole, once, from any place."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashvl.data.inputs import json_array, jsonl
from flashvl.data.inputs.json_array import BrokenArrayError, read_elements
from flashvl.data.inputs.records import find_records
from flashvl.data.inputs.samples import SAMPLES
from flashvl.data.inputs.source import Source
from flashvl.data.limits import DEFAULT_LIMITS
from flashvl.errors import ConfigError
from tests.support.jobs import write_tar

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(JSON, max_size=8),
    is_ascii=st.booleans(),
    indent=st.sampled_from([None, 1]),
    scan=st.sampled_from([1, 7, 2**20]),
    data=st.data(),
)
def test_an_array_is_read_from_any_element(
    rows: list[Any], is_ascii: bool, indent: int | None, scan: int, data: st.DataObject
) -> None:
    text = json.dumps(rows, ensure_ascii=is_ascii, indent=indent).encode(errors="replace")
    rows = json.loads(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BYTES_PER_SCAN", scan)
        found = list(read_elements(io.BytesIO(text), 2**20))
        assert [json.loads(element) for _, element in found] == rows
        if rows:
            first = data.draw(st.integers(0, len(rows) - 1))
            last = data.draw(st.integers(first, len(rows) - 1))
            stream = io.BytesIO(text)
            stream.seek(found[first][0])
            assert list(read_elements(stream, 2**20, found[last][0])) == found[first + 1 : last + 1]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(JSON, min_size=1, max_size=5), place=st.integers(0, 10**6))
def test_an_array_that_is_cut_off_loses_its_rest_only(rows: list[Any], place: int) -> None:
    text = json.dumps(rows).encode()
    text = text[: place % len(text)]
    found = []
    with pytest.raises(BrokenArrayError):
        for _, element in read_elements(io.BytesIO(text), 2**20):
            found.append(json.loads(element))
    assert found == rows[: len(found)] or not isinstance(found[-1], list | dict | str)


def read_all(source: Source, is_done: np.ndarray | None = None) -> list[dict[str, Any]]:
    done = np.zeros(source.num_rows, bool) if is_done is None else is_done
    return sorted(source.read(done).take_all(), key=lambda row: row["row"])


def find(path: Path, *kinds: str, needed: tuple[str, ...] = ("a",)) -> Source:
    return find_records(str(path), kinds=kinds, needed=needed, used=(), image_limits=DEFAULT_LIMITS)


@pytest.mark.parametrize("end", ["json", "jsonl", "json.gz"])
def test_json_is_read_in_pieces(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(jsonl, "ROWS_PER_PIECE", 3)
    rows = [{"a": f"{n} \u00e9"} for n in range(20)]
    text = "\n".join(map(json.dumps, rows)) if end == "jsonl" else json.dumps(rows, indent=1)
    data = text.encode()
    file = tmp_path / f"x.{end}"
    file.write_bytes(gzip.compress(data) if end.endswith("gz") else data)
    source = find(file, "json")
    found = read_all(source)
    assert [json.loads(row["record"]) for row in found] == rows
    assert [row["row"] for row in found] == list(range(20))
    is_done = np.arange(20) % 3 != 1
    assert [row["row"] for row in read_all(source, is_done)] == list(range(1, 20, 3))


def test_the_rest_of_a_broken_array_is_one_row(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"a": 1}, {"a": 2}, {"a": ')
    found = read_all(find(tmp_path, "json"))
    assert [row["step"] for row in found] == [None, None, "read"]
    assert "x.json is broken after element 2" in found[2]["reason"]


def test_samples_of_a_tar(ray_cluster: None, tmp_path: Path) -> None:
    members = {
        "d/2.json": b'{"a": 2}',
        "d/2.left.jpg": b"left",
        "d/2.right.jpg": b"right",
        "d/1.jpg": b"one",
        "d/1.json": b'{"a": 1}',
        "d/3.json": b'{"a": 3}',
        "README.md": b"not a sample",
    }
    write_tar(tmp_path / "x.tar.gz", members, "w:gz")
    write_tar(tmp_path / "y.tar", {"0.json": b'{"a": 0}'})
    with (tmp_path / "z.tar").open("wb") as file:
        whole = tmp_path / "whole"
        write_tar(whole, {"7.json": b'{"a": 7}', "8.json": b"x" * 2000})
        file.write(whole.read_bytes()[:1600])
        whole.unlink()
    source = find(tmp_path, "tar")
    found = read_all(source)
    assert set(found[0]) == set(SAMPLES.names)
    assert [(row["id"], row["record"] and json.loads(row["record"])["a"]) for row in found[:5]] == [
        ("d/2", 2),
        ("d/1", 1),
        ("d/3", 3),
        ("0", 0),
        ("7", 7),
    ]
    images = [[image["image"] for image in row["images"] or ()] for row in found]
    assert images == [[b"left", b"right"], [b"one"], [], [], [], []]
    assert [row["step"] for row in found] == [None] * 5 + ["read"]
    assert "z.tar is broken" in found[5]["reason"]


def test_inputs_of_another_set_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"0.jpg": b"x"})
    with pytest.raises(ConfigError, match=r"no member of the 1 tars is called KEY\.json"):
        find(tmp_path, "tar")
    (tmp_path / "x.json").write_text('[{"b": 1}]')
    with pytest.raises(ConfigError, match="no record has the field 'a'; fields: b"):
        find(tmp_path, "json")
    (tmp_path / "x.json").write_text("")
    assert find(tmp_path, "json").num_rows == 0
