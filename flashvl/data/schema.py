"""The Arrow schemas: the only contract for rows between the parts of flashvl.

It knows column names and types, not what is in the rows, nor where a table is kept.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from flashvl.data.plain import is_list, plain_type
from flashvl.errors import ConfigError

IMAGE_MARKER = "<image>"
"""Stands in a message's content where an image goes, as in LLaVA's data."""

CONVERSATIONS = pa.schema(
    [
        ("row", pa.int64()),
        ("images", pa.list_(pa.binary())),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)
"""Input of training. `row` is the row's place in the data, from 0; `images`, encoded and perhaps
none, are in the order of the `IMAGE_MARKER`s in the messages."""

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
    [
        ("id", pa.string()),
        ("step", pa.string()),
        ("error", pa.string()),
        ("reason", pa.string()),
        ("row", pa.int64()),
    ]
)
"""Output of captioning: one row for each input row that could not be captioned: at which `step`
(read, decode, caption), the class of the `error`, and in words why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageColumns:
    """Which columns of an image table are what."""

    image: str
    id: str | None
    """None: the table has none."""
    prompt: str | None = None
    """None: all rows are asked the same."""
    kept: tuple[str, ...] = ()
    """Go through to the output as they are."""
    follows_paths: bool = True
    """Where a row names its image's file, that is read."""

    @property
    def names(self) -> list[str]:
        """All that are to be read, each once."""
        names = [self.image, self.id, self.prompt, *self.kept]
        return list(dict.fromkeys(name for name in names if name is not None))


def find_image_columns(
    schema: pa.Schema,
    source: str,
    *,
    image: str | None = None,
    id: str | None = None,
    prompt: str | None = None,
    kept: Sequence[str] = (),
    partition: Collection[str] = (),
) -> ImageColumns:
    """The columns of a table that is to be captioned: those named, else those found.

    The image's is `image`, else the only one that holds images; it may hold encoded bytes, the
    `struct<bytes, path>` that Hugging Face datasets write, paths, or lists of any of these. The
    id's is `id`, if there is one. Order and further columns do not matter.

    Args:
        source: the table's path, which begins the error's line.
        partition: columns that folders' names tell; none of them holds images unless it is named.

    Raises:
        ConfigError: a column is missing, is there twice, has another type, or has a name that the
            output needs.
    """
    names = schema.names
    if id is None and "id" in names:
        id = "id"
    if image is None:
        images = [
            field.name
            for field in schema
            if _is_surely_image(field.type) and field.name not in (id, prompt)
        ]
        is_named = "image" in names and "image" not in partition
        image = images[0] if not is_named and len(images) == 1 else "image"
    for role, name, is_accepted, wanted in (
        ("id", id, is_id, "a string or an integer, bytes, a UUID, a decimal or a time"),
        (
            "image",
            image,
            _is_image,
            "encoded bytes, struct<bytes, path>, or a path (string), or a list of them",
        ),
        ("prompt", prompt, is_text, "a string"),
        *(("keep", name, lambda _: True, "any") for name in kept),
    ):
        if name is not None:
            _check_column(schema, source, role, name, is_accepted, wanted)
    kept = tuple(name for name in dict.fromkeys(kept) if not name == id == "id")
    for name in kept:
        if name in (*CAPTIONS.names, *DEAD_LETTERS.names):
            raise ConfigError(
                f"{source}: column {name!r} cannot be kept, as the output has its own; rename it"
            )
    return ImageColumns(image=image, id=id, prompt=prompt, kept=kept)


def _check_column(
    schema: pa.Schema,
    source: str,
    role: str,
    name: str,
    is_accepted: Callable[[pa.DataType], bool],
    wanted: str,
) -> None:
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    num_found = len(schema.get_all_field_indices(name))
    if num_found != 1:
        problem = "has no column" if not num_found else f"has {num_found} columns"
        raise ConfigError(
            f"{source} {problem} {name!r}; columns: {columns}. Name the right one with"
            f" --{role}{'' if role == 'keep' else '-column'}, or make exactly one."
        )
    column_type = schema.field(name).type
    if not is_accepted(column_type):
        raise ConfigError(
            f"{source}: column {name!r} has type {column_type}; columns: {columns}."
            f" Convert {name!r}: it must be {wanted}."
        )


def is_paths(column_type: pa.DataType) -> bool:
    """It holds no image, only says where each lies."""
    if is_list(column_type):
        return is_paths(column_type.value_type)
    return is_text(column_type) or (is_pair(column_type) and not _has_bytes(column_type))


def is_id(column_type: pa.DataType) -> bool:
    return is_text(column_type) or is_binary(column_type) or _has_plain_text(column_type)


def is_text(column_type: pa.DataType) -> bool:
    """It holds text, of whatever layout."""
    plain = plain_type(column_type)
    return pa.types.is_string(plain) or pa.types.is_large_string(plain)


def is_binary(column_type: pa.DataType) -> bool:
    """It holds bytes, of whatever layout."""
    plain = plain_type(column_type)
    return (
        pa.types.is_binary(plain)
        or pa.types.is_large_binary(plain)
        or pa.types.is_fixed_size_binary(plain)
    )


def is_pair(column_type: pa.DataType) -> bool:
    """As Hugging Face's `Image` feature is stored: `bytes`, `path`, or both."""
    plain = plain_type(column_type)
    if not pa.types.is_struct(plain):
        return False
    types = {field.name: field.type for field in plain.fields}
    has_path = is_text(types.get("path", pa.null()))
    if pa.types.is_null(types.get("bytes", pa.null())):  # as of a table whose images all lie apart
        return has_path
    return is_binary(types["bytes"])


def _has_bytes(pair: pa.DataType) -> bool:
    plain = plain_type(pair)
    return any(field.name == "bytes" and is_binary(field.type) for field in plain.fields)


def _is_image(column_type: pa.DataType) -> bool:
    if is_list(column_type):
        return _is_image(column_type.value_type) and not is_list(column_type.value_type)
    return is_binary(column_type) or is_pair(column_type) or is_text(column_type)


def _is_surely_image(column_type: pa.DataType) -> bool:
    """Text may be anything, and bytes that are all of one length are a hash or a UUID."""
    if is_list(column_type):
        column_type = column_type.value_type
    if is_binary(column_type):
        return not pa.types.is_fixed_size_binary(plain_type(column_type))
    return is_pair(column_type)


def _has_plain_text(column_type: pa.DataType) -> bool:
    """What it holds is told in text in one way."""
    return any(
        test(column_type)
        for test in (
            pa.types.is_integer,
            pa.types.is_decimal,
            pa.types.is_date,
            pa.types.is_timestamp,
        )
    )
