"""Schemas: which tables a captioning job accepts, and remedies in its refusals."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashvl.data import schema
from flashvl.errors import ConfigError

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE_TYPES = [pa.binary(), pa.large_binary(), pa.binary_view(), HF_IMAGE, pa.string()]
ID_TYPES = [pa.string(), pa.large_string(), pa.int64(), pa.uint8()]


@pytest.mark.parametrize("id_type", ID_TYPES, ids=str)
@pytest.mark.parametrize("image_type", IMAGE_TYPES, ids=str)
def test_accepts_every_usual_table(id_type: pa.DataType, image_type: pa.DataType) -> None:
    table = pa.schema([("url", pa.string()), ("image", image_type), ("id", id_type)])
    columns = schema.find_image_columns(table, "images.parquet")
    assert (columns.image, columns.id, columns.prompt) == ("image", "id", None)


def test_accepts_a_table_that_went_through_parquet(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    table = pa.schema([("id", pa.string()), ("image", pa.binary())])
    pq.write_table(table.empty_table(), path)
    columns = schema.find_image_columns(pq.read_schema(path), str(path))
    assert columns.names == ["image", "id"]


def test_finds_the_only_column_of_images_and_takes_what_is_named() -> None:
    table = pa.schema(
        [("key", pa.int64()), ("jpg", pa.binary()), ("ask", pa.string()), ("w", pa.int32())]
    )
    columns = schema.find_image_columns(table, "t")
    assert columns.image == "jpg" and columns.id is None
    columns = schema.find_image_columns(table, "t", id="key", prompt="ask", kept=["w", "ask", "w"])
    assert columns.names == ["jpg", "key", "ask", "w"]
    assert columns.kept == ("w", "ask")


IMAGE = ("image", pa.binary())


@pytest.mark.parametrize(
    ("columns", "named", "said"),
    [
        ([("a", pa.binary()), ("b", pa.binary())], {}, ["no column 'image'", "--image-column"]),
        ([], {}, ["no column 'image'", "columns: none"]),
        ([IMAGE], {"id": "key"}, ["no column 'key'", "image (binary)", "--id-column"]),
        ([("id", pa.float64()), IMAGE], {}, ["'id' has type double", "a string or"]),
        ([("image", pa.list_(pa.uint8()))], {}, ["'image' has type list<", "or a path"]),
        (
            [("image", pa.struct([("bytes", pa.string())]))],
            {},
            ["'image' has type struct<bytes: string>", "Convert 'image'"],
        ),
        ([("id", pa.int64()), ("id", pa.string()), IMAGE], {}, ["2 columns 'id'"]),
        ([IMAGE, ("n", pa.int8())], {"prompt": "n"}, ["'n' has type int8", "must be a string"]),
        ([IMAGE], {"kept": ["w"]}, ["no column 'w'", "--keep"]),
        ([IMAGE, ("caption", pa.string())], {"kept": ["caption"]}, ["'caption'", "rename it"]),
    ],
)
def test_refuses_in_one_line(
    columns: list[tuple[str, pa.DataType]], named: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        schema.find_image_columns(pa.schema(columns), "some/images.parquet", **named)
    message = str(caught.value)
    assert message.startswith("some/images.parquet") and "\n" not in message
    for part in said:
        assert part in message


def test_rows_survive_parquet(tmp_path: Path) -> None:
    rows = {
        "CONVERSATIONS": {
            "row": 2**40,
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
        "DEAD_LETTERS": {
            "id": "8",
            "step": "decode",
            "error": "DataError",
            "reason": "image is empty",
            "row": 3,
        },
    }
    for name, row in rows.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row], schema=getattr(schema, name)), path)
        assert pq.read_table(path).to_pylist() == [row]
