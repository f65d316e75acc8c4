"""The Arrow schemas of the tables that one part of flashvl writes and another reads.

It knows column names and types, not what is in the rows, nor where a table is kept.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from flashvl.data.plain import is_list, plain_type
from flashvl.errors import ConfigError

IMAGE_MARKER = "<image>"
"""Text that marks the place of an image in a message's content, as in LLaVA's data."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""Messages of a conversation, in their order."""

CONVERSATIONS = pa.schema(
    [("row", pa.int64()), ("images", pa.list_(pa.binary())), ("messages", MESSAGES)]
)
"""Input of training. `row` numbers the rows from 0; `images` holds encoded images, or none, in the
order of the `IMAGE_MARKER`s in the messages."""

PREFERENCES = pa.schema(
    [
        ("row", pa.int64()),
        ("images", pa.list_(pa.binary())),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
    ]
)
"""Input of preference training: a prompt whose better answer is `chosen`."""

PROMPTS = pa.schema(
    [
        ("row", pa.int64()),
        ("images", pa.list_(pa.binary())),
        ("prompt", MESSAGES),
        ("answer", pa.string()),
    ]
)
"""Input of reinforcement learning: a prompt, and the answer that a reward compares with."""

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
"""Output of captioning: a row for each input row that has a caption. `row` is the number of the
input row, from 0: it is unique, while an id need not be."""

DEAD_LETTERS = pa.schema(
    [
        ("id", pa.string()),
        ("step", pa.string()),
        ("error", pa.string()),
        ("reason", pa.string()),
        ("row", pa.int64()),
    ]
)
"""A row for each input row without a result: the `step` that failed (read, convert, decode,
caption), the class of the `error`, and the reason in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageColumns:
    """The roles of an image table's columns, by name."""

    image: str | None
    """Column of images; None: the table is read for other columns."""
    id: str | None
    """Column of ids; None: the table has none."""
    prompt: str | None = None
    """Column of prompts; None: all rows get the same prompt."""
    kept: tuple[str, ...] = ()
    """Columns that are copied to the output."""
    follows_paths: bool = True
    """Whether the image files that rows name are read."""

    @property
    def names(self) -> list[str]:
        """The columns to read, each once."""
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
    """Find the columns that captioning a table needs.

    The image column is the one called `image`, else the only one that holds images: encoded bytes,
    the `struct<bytes, path>` of Hugging Face datasets, paths, or lists of any of these. The id
    column is the one called `id`, if there is one. Order and further columns do not matter.

    Args:
        source: the table's path, which begins the error's line.
        image, id, prompt, kept: columns that the user has named.
        partition: columns made of folder names; none is the image column unless the user names it.

    Raises:
        ConfigError: a column is missing, ambiguous or of a wrong type, or one to keep has a name
            that the output needs.
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
    """Whether a column of this type holds the paths of images, and not the images."""
    if is_list(column_type):
        return is_paths(column_type.value_type)
    return is_text(column_type) or (is_pair(column_type) and not _has_bytes(column_type))


def is_id(column_type: pa.DataType) -> bool:
    """Whether a column of this type may hold ids."""
    return is_text(column_type) or is_binary(column_type) or _has_plain_text(column_type)


def is_text(column_type: pa.DataType) -> bool:
    """Whether the type is text, in any of Arrow's layouts."""
    plain = plain_type(column_type)
    return pa.types.is_string(plain) or pa.types.is_large_string(plain)


def is_binary(column_type: pa.DataType) -> bool:
    """Whether the type is bytes, in any of Arrow's layouts."""
    plain = plain_type(column_type)
    return (
        pa.types.is_binary(plain)
        or pa.types.is_large_binary(plain)
        or pa.types.is_fixed_size_binary(plain)
    )


def is_pair(column_type: pa.DataType) -> bool:
    """Whether the type is that of Hugging Face's `Image` feature: `bytes`, `path`, or both."""
    plain = plain_type(column_type)
    if not pa.types.is_struct(plain):
        return False
    types = {field.name: field.type for field in plain.fields}
    has_path = is_text(types.get("path", pa.null()))
    if pa.types.is_null(types.get("bytes", pa.null())):  # all images are files of their own
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
    """Whether the type alone shows that a column holds images.

    Text may be anything, and bytes of one length may be hashes or UUIDs.
    """
    if is_list(column_type):
        column_type = column_type.value_type
    if is_binary(column_type):
        return not pa.types.is_fixed_size_binary(plain_type(column_type))
    return is_pair(column_type)


def _has_plain_text(column_type: pa.DataType) -> bool:
    """Whether values of the type have exactly one form as text."""
    return any(
        test(column_type)
        for test in (
            pa.types.is_integer,
            pa.types.is_decimal,
            pa.types.is_date,
            pa.types.is_timestamp,
        )
    )
