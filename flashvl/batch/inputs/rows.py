"""What the sources of loosely typed files share: rows that are Python objects -> Arrow tables."""

import json
import os
import posixpath
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from flashvl.batch.inputs.source import FAILURE, KEYS
from flashvl.data.fetching import is_data_url
from flashvl.data.storage import is_uri

MAX_READ_TASKS = 512
"""An input's pieces are read by so many tasks at most, several in one where there are more."""
ROWS_PER_READ = 64
"""Rows that a task holds at once, at most; fewer where they are large."""
BYTES_PER_READ = 32 * 2**20


def as_blocks(pieces: Sequence[pa.Table], schema: pa.Schema) -> list[pa.Table]:
    """Tables of `schema`, each for one task."""
    size = -(-len(pieces) // MAX_READ_TASKS)
    groups = (pieces[start : start + size] for start in range(0, len(pieces), size or 1))
    return [pa.concat_tables(group).select(schema.names).combine_chunks() for group in groups]


def as_table(
    rows: Sequence[dict[str, Any]], kept: pa.Schema, images: Sequence[pa.Field], has_prompt: bool
) -> pa.Table:
    """Of `Source.read`, from rows that have its names; what one leaves out is null.

    Args:
        rows: one with a `problem` is a dead letter for that reason.
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
    """A URI or data URL in a table of `folder` -> itself; a path, one in the table's own store."""
    text = os.fsdecode(path)
    return path if is_uri(text) or is_data_url(text) else posixpath.join(folder, path)


def as_name(path: str) -> str:
    """A path, or a name in a tar, that may be no valid text, made readable."""
    return os.fsencode(path).decode(errors="replace")


def as_text(value: Any) -> str | None:
    """A JSON value as text: a string as it is, all else as JSON; no half of a surrogate pair."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()
