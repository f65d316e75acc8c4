"""The Arrow schemas: the only contract for rows between the parts of flashvl.

It knows column names and types, not what is in the rows, nor where a table is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from flashvl.errors import ConfigError

IMAGE_MARKER = "<image>"
"""Stands in a message's content where an image goes, as in LLaVA's data."""

IMAGE_TABLE = pa.schema([("id", pa.string()), ("image", pa.binary())])
"""Input of captioning, in its plainest form: one encoded image (JPEG, PNG, ...) a row. See
`find_image_columns` for the others."""

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
    [
        ("id", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("reason", pa.string()),
        ("row", pa.int64()),
    ]
)
"""Output of captioning: one row for each input row that could not be captioned: at which `stage`
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
) -> ImageColumns:
    """The columns of a table that is to be captioned: those named, else those found.

    The image's is `image`, else the only one that holds images; it may hold encoded bytes, the
    `struct<bytes, path>` that Hugging Face datasets write, or paths. The id's is `id`, if there is
    one, a string or an integer. Order and further columns do not matter.

    Args:
        source: the table's path, which begins the error's line.

    Raises:
        ConfigError: a column is missing, is there twice, has another type, or has a name that the
            output needs.
    """
    names = schema.names
    if image is None:
        images = [field.name for field in schema if is_binary(field.type) or _is_pair(field.type)]
        image = images[0] if "image" not in names and len(images) == 1 else "image"
    if id is None and "id" in names:
        id = "id"
    for role, name, is_accepted, wanted in (
        ("id", id, _is_id, "a string or an integer"),
        ("image", image, _is_image, "encoded bytes, struct<bytes, path>, or a path (string)"),
        ("prompt", prompt, _is_text, "a string"),
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


def _is_image(column_type: pa.DataType) -> bool:
    return is_binary(column_type) or _is_pair(column_type) or _is_text(column_type)


def _is_id(column_type: pa.DataType) -> bool:
    return _is_text(column_type) or pa.types.is_integer(column_type)


def _is_text(column_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(column_type):
        return _is_text(column_type.value_type)
    return any(
        test(column_type)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _is_pair(column_type: pa.DataType) -> bool:
    """As Hugging Face's `Image` feature is stored; of the two, `path` may be missing."""
    if not pa.types.is_struct(column_type):
        return False
    index = column_type.get_field_index("bytes")
    return index >= 0 and is_binary(column_type.field(index).type)


def is_binary(column_type: pa.DataType) -> bool:
    """It holds bytes, of whatever layout."""
    return any(
        test(column_type)
        for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    )
