"""The columns of an image table, of whatever types -> the rows that a `Source` reads.

Strings in Parquet need not be UTF-8. A row whose id or prompt is not UTF-8 becomes a dead letter,
with its id escaped. A path may be any bytes, as on a disk. Copied columns are made readable.
"""

import itertools
import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from flashvl.data.inputs.kept import bundle
from flashvl.data.inputs.rows import resolve_path
from flashvl.data.inputs.source import FAILURE, IMAGES
from flashvl.data.plain import is_list, is_valid_text, plain_type, to_plain
from flashvl.data.schema import ImageColumns, is_binary, is_pair, is_text

Problems = dict[int, str]
"""Reasons why rows cannot be captioned, by the rows' places in a table."""


def as_rows(
    table: pa.Table,
    columns: ImageColumns,
    *,
    folder: str,
    made_ids: Sequence[str],
    damage: str | None,
) -> pa.Table:
    """The columns of `Source.read`, without `row`.

    Args:
        folder: folder of the table's file, to which paths are relative.
        made_ids: ids for rows without one of their own.
        damage: reason why none of these rows can be captioned, if they are damaged.
    """
    found: dict[str, pa.Array | pa.ChunkedArray] = {}
    found["id"], problems = _read_ids(table, columns.id, made_ids)
    if columns.image is not None:
        folder_of_paths = folder if columns.follows_paths else None
        found |= _split_images(table[columns.image], folder_of_paths)
    if columns.prompt is not None:
        found["prompt"], bad_prompts = _read_text(table[columns.prompt], "prompt")
        problems = bad_prompts | problems
    if columns.kept:
        found["kept"] = bundle(table.select(columns.kept))
    if damage is not None:
        found["id"] = pc.coalesce(found["id"], pa.array(made_ids, pa.string()))
        problems = dict.fromkeys(range(table.num_rows), damage)
    failures = [
        {"step": "read", "error": "DataError", "reason": problems[row]} if row in problems else {}
        for row in range(table.num_rows)
    ]
    failed = pa.Table.from_pylist(failures, schema=pa.schema(FAILURE))
    return pa.table(found | dict(zip(failed.column_names, failed.columns, strict=True)))


def _read_ids(
    table: pa.Table, column: str | None, made_ids: Sequence[str]
) -> tuple[pa.Array | pa.ChunkedArray, Problems]:
    """Ids as text: bytes of a fixed length in hex, other bytes as the text that they hold."""
    if column is None:
        return pa.array(made_ids, pa.string()), {}
    ids = table[column]
    if is_text(ids.type):
        return _read_text(ids, "id")
    if not is_binary(ids.type):
        return ids.cast(pa.string()), {}
    if ids.type == pa.uuid():
        texts = [None if each is None else str(each) for each in ids.to_pylist()]
    elif types.is_fixed_size_binary(plain_type(ids.type)):
        texts = [None if each is None else each.hex() for each in _as_bytes(ids)]
    else:
        texts = [_escape(each) for each in _as_bytes(ids)]
    return pa.array(texts, pa.string()), {}


def _read_text(column: pa.ChunkedArray, role: str) -> tuple[pa.Array | pa.ChunkedArray, Problems]:
    """Texts, escaped where they are not UTF-8, and the problems of those rows."""
    column = to_plain(column)
    if is_valid_text(column):
        return column.cast(pa.string()), {}
    texts, problems = [], {}
    for row, data in enumerate(_as_bytes(column)):
        texts.append(_escape(data))
        if data is not None and not _is_utf8(data):
            problems[row] = f"{role} is not UTF-8: {data[:40]!r}; write the text as UTF-8"
    return pa.array(texts, pa.string()), problems


def _as_bytes(column: pa.Array | pa.ChunkedArray) -> list[bytes | None]:
    return to_plain(column).cast(pa.large_binary()).to_pylist()


def _escape(data: bytes | None) -> str | None:
    return None if data is None else data.decode(errors="backslashreplace")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split_images(
    column: pa.ChunkedArray, folder: str | None
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """The columns `image` and `path`, or `images`.

    Args:
        folder: folder to which paths are relative; None: they are not followed.
    """
    if not is_list(column.type):
        images, paths = _split(column, folder)
        return {"image": images, "path": pa.array(paths, pa.binary())}
    lists = column.combine_chunks()
    images, paths = _split(pa.chunked_array([lists.flatten()]), folder)
    pairs = iter(
        [
            {"image": image, "path": path}
            for image, path in zip(images.to_pylist(), paths, strict=True)
        ]
    )
    lengths = pc.list_value_length(lists).to_pylist()
    rows = [None if n is None else list(itertools.islice(pairs, n)) for n in lengths]
    return {"images": pa.array(rows, IMAGES.type)}


def _split(
    column: pa.ChunkedArray, folder: str | None
) -> tuple[pa.Array | pa.ChunkedArray, list[bytes | None]]:
    """The images' bytes, null where there are none, and the paths of images that are files."""
    column = to_plain(column)
    nothing = pa.chunked_array([pa.nulls(len(column), pa.large_binary())])
    images, paths = nothing, nothing
    if is_pair(column.type):
        names = {field.name for field in column.type.fields}
        if "bytes" in names:
            images = pc.struct_field(column, "bytes").cast(pa.large_binary())
        if "path" in names:
            paths = pc.struct_field(column, "path").cast(pa.large_binary())
            paths = pc.if_else(pc.is_null(images), paths, None)
    elif is_text(column.type):
        paths = column.cast(pa.large_binary())
    else:
        images = column.cast(pa.large_binary())
    if folder is None:
        paths = nothing
    return images, [
        path and resolve_path(path, os.fsencode(folder or "")) for path in paths.to_pylist()
    ]
