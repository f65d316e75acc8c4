"""Schemas: what a captioning job accepts, and that a refusal says what to do."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashvl.data import schema
from flashvl.errors import ConfigError

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE_TYPES = [pa.binary(), pa.large_binary(), HF_IMAGE]
ID_TYPES = [pa.string(), pa.large_string(), pa.int64(), pa.uint8()]


@pytest.mark.parametrize("id_type", ID_TYPES, ids=str)
@pytest.mark.parametrize("image_type", IMAGE_TYPES, ids=str)
def test_accepts_every_usual_table(id_type: pa.DataType, image_type: pa.DataType) -> None:
    table = pa.schema([("url", pa.string()), ("image", image_type), ("id", id_type)])
    schema.check_image_table(table, "images.parquet")


def test_accepts_its_own_schema_and_what_parquet_makes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    pq.write_table(schema.IMAGE_TABLE.empty_table(), path)
    schema.check_image_table(pq.read_schema(path), str(path))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ([("key", pa.string()), ("image", pa.binary())], ["no column 'id'", "key (string)"]),
        ([("id", pa.string()), ("jpg", pa.binary())], ["no column 'image'", "jpg (binary)"]),
        ([], ["no column 'id'", "columns: none"]),
        ([("id", pa.float64()), ("image", pa.binary())], ["'id' has type double", "a string or"]),
        ([("id", pa.string()), ("image", pa.string())], ["'image' has type string", "not a path"]),
        ([("id", pa.int64()), ("image", pa.list_(pa.uint8()))], ["'image' has type list<"]),
        (
            [("id", pa.int64()), ("image", pa.struct([("bytes", pa.string())]))],
            ["'image' has type struct<bytes: string>", "Convert 'image'"],
        ),
        (
            [("id", pa.int64()), ("image", pa.struct([("path", pa.string())]))],
            ["'image' has type struct<path: string>"],
        ),
        ([("id", pa.int64()), ("id", pa.string()), ("image", pa.binary())], ["2 columns 'id'"]),
    ],
)
def test_refuses_in_one_line(columns: list[tuple[str, pa.DataType]], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        schema.check_image_table(pa.schema(columns), "some/images.parquet")
    message = str(caught.value)
    assert message.startswith("some/images.parquet") and "\n" not in message
    for part in said:
        assert part in message


def test_rows_survive_parquet(tmp_path: Path) -> None:
    rows = {
        "CONVERSATIONS": {
            "index": 2**40,
            "images": [b"\xff\xd8", b""],
            "messages": [{"role": "user", "content": f"{schema.IMAGE_MARKER}\nWhat is it?"}],
        },
        "CAPTIONS": {
            "id": "7",
            "caption": "a cat",
            "prompt_tokens": 260,
            "completion_tokens": 3,
            "finish_reason": "stop",
            "row": 2**40,
        },
        "DEAD_LETTERS": {"id": "8", "stage": "decode", "reason": "image is empty", "row": 3},
    }
    for name, row in rows.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row], schema=getattr(schema, name)), path)
        assert pq.read_table(path).to_pylist() == [row]
