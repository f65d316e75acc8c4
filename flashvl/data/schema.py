"""The Arrow schemas: the only contract for rows between the parts of flashvl.

It knows column names and types, not what is in the rows, nor where a table is kept.
"""

import pyarrow as pa

from flashvl.errors import ConfigError

IMAGE_MARKER = "<image>"
"""Stands in a message's content where an image goes, as in LLaVA's data."""

IMAGE_TABLE = pa.schema([("id", pa.string()), ("image", pa.binary())])
"""Input of captioning: one encoded image (JPEG, PNG, ...) a row; more columns are allowed."""

CONVERSATIONS = pa.schema(
    [
        ("index", pa.int64()),
        ("images", pa.list_(pa.binary())),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)
"""Input of training. `index` is the row's stable number; `images`, encoded and perhaps none, are in
the order of the `IMAGE_MARKER`s in the messages."""

CAPTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("row", pa.int64()),
    ]
)
"""Output of captioning: one row for each image that has a caption. `row` is its place in the input,
from 0, which is one of a kind where an id need not be."""

DEAD_LETTERS = pa.schema(
    [("id", pa.string()), ("stage", pa.string()), ("reason", pa.string()), ("row", pa.int64())]
)
"""Output of captioning: one row for each input row that could not be captioned, and why."""


def check_image_table(schema: pa.Schema, source: str) -> None:
    """Check that a table can be captioned: the columns of `IMAGE_TABLE`, in any type that will do.

    An id may be any string or integer; an image any binary, or the `struct<bytes, path>` that
    Hugging Face datasets write. Order and further columns do not matter.

    Args:
        source: the table's path, which begins the error's line.

    Raises:
        ConfigError: a column is missing, is there twice, or has another type.
    """
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    for name, is_accepted, wanted in (
        ("id", _is_id, "a string or an integer"),
        ("image", _is_image, "encoded image bytes (binary), not a path, a URL or pixels"),
    ):
        found = schema.get_all_field_indices(name)
        if len(found) != 1:
            problem = "has no column" if not found else f"has {len(found)} columns"
            raise ConfigError(
                f"{source} {problem} {name!r}; columns: {columns}. "
                f"Name exactly one column {name!r}; it must be {wanted}."
            )
        column_type = schema.field(found[0]).type
        if not is_accepted(column_type):
            raise ConfigError(
                f"{source}: column {name!r} has type {column_type}; columns: {columns}. "
                f"Convert {name!r}: it must be {wanted}."
            )


def _is_id(column_type: pa.DataType) -> bool:
    is_string = pa.types.is_string(column_type) or pa.types.is_large_string(column_type)
    return is_string or pa.types.is_integer(column_type)


def _is_image(column_type: pa.DataType) -> bool:
    if pa.types.is_struct(column_type):
        index = column_type.get_field_index("bytes")
        return index >= 0 and _is_binary(column_type.field(index).type)
    return _is_binary(column_type)


def _is_binary(column_type: pa.DataType) -> bool:
    return pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type)
