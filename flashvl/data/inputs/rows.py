"""Rows as Python objects -> Arrow tables, for the sources of loosely typed files."""

import json
import os
import posixpath
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from flashvl.data.fetching import is_data_url
from flashvl.data.inputs.source import FAILURE, KEYS
from flashvl.data.storage import is_uri

MAX_READ_TASKS = 512
"""Tasks that read an input at most; where it has more pieces, a task reads several."""
ROWS_PER_READ = 64
"""Rows that a reading task holds at once, at most; fewer where they are large."""
BYTES_PER_READ = 32 * 2**20
"""Bytes of those rows, at most, unless one row has more."""


def as_blocks(pieces: Sequence[pa.Table], schema: pa.Schema) -> list[pa.Table]:
    """The pieces as tables of `schema`, one for each task."""
    size = -(-len(pieces) // MAX_READ_TASKS)
    groups = (pieces[start : start + size] for start in range(0, len(pieces), size or 1))
    return [pa.concat_tables(group).select(schema.names).combine_chunks() for group in groups]


def as_table(
    rows: Sequence[dict[str, Any]], kept: pa.Schema, images: Sequence[pa.Field], has_prompt: bool
) -> pa.Table:
    """A table as from `Source.read`; values that a row leaves out are null.

    Args:
        rows: a row with a `problem` becomes a dead letter for that reason.
        images: `IMAGE` or `IMAGES`.
    """
    fields = [*KEYS, *images, *FAILURE]
    if has_prompt:
        fields.append(pa.field("prompt", pa.string()))
    if len(kept):
        fields.append(pa.field("kept", pa.struct(list(kept))))
    failed = [
        row | {"step": "read", "error": "DataError", "reason": row["problem"]}
        if row.get("problem") is not None
        else row
        for row in rows
    ]
    return pa.Table.from_pylist(failed, schema=pa.schema(fields))


def resolve_path(path: bytes, folder: bytes) -> bytes:
    """A path of a table in `folder` -> a path in the table's store; URIs and data URLs stay."""
    text = os.fsdecode(path)
    return path if is_uri(text) or is_data_url(text) else posixpath.join(folder, path)


def as_name(path: str) -> str:
    """A path, or a name in a tar, made readable where it is not valid text."""
    return os.fsencode(path).decode(errors="replace")


def as_text(value: Any) -> str | None:
    """A JSON value as text: a string as it is, other values as JSON, lone surrogates replaced."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()
