"""Records -> rows of results or dead letters, in CPU tasks.

Each image is decoded once to see that training can, and is kept as its original bytes. An error
other than `DataError` is the machine's and is raised as it is.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from flashvl.data.convert.conversations import as_text
from flashvl.data.convert.family import Family, Record
from flashvl.data.images import decode_reduced
from flashvl.data.inputs.image_reader import ImageReader, failure
from flashvl.data.inputs.jsonl import parse_line, read_image_field
from flashvl.data.inputs.rows import BYTES_PER_READ, resolve_path
from flashvl.data.inputs.source import FAILURE
from flashvl.data.limits import ImageLimits
from flashvl.data.storage import Location, is_uri
from flashvl.errors import DataError

READS_AT_ONCE = 8
"""Rows whose images a task reads from a store at the same time."""


def convert_rows(
    rows: pa.Table,
    *,
    family: Family,
    folder: Location,
    is_elsewhere: bool,
    image_limits: ImageLimits,
    media_hosts: tuple[str, ...],
) -> Iterator[pa.Table]:
    """Rows that `find_records`' source has read -> those of the family's table and `FAILURE`.

    Args:
        folder: folder of the images that rows name.
        is_elsewhere: the images were brought there, so that absolute paths do not hold.
        media_hosts: hosts from which images may be fetched where a row has a URL.
    """
    schema = answered_schema(family)
    converted = [_convert(row, family, folder, is_elsewhere) for row in rows.to_pylist()]
    with_images = [row for row in converted if row.get("images")]
    reader = ImageReader(with_images, image_limits, folder.store, media_hosts)
    finished: list[dict[str, Any]] = []
    num_bytes = 0
    # Where images are objects in a store, a row is mostly waiting for them.
    with ThreadPoolExecutor(1 if folder.is_local else READS_AT_ONCE) as pool:
        for row in pool.map(lambda row: _with_images(row, reader), converted):
            finished.append(row)
            num_bytes += sum(map(len, row.get("images") or ()))
            if num_bytes >= BYTES_PER_READ:
                yield pa.Table.from_pylist(finished, schema=schema)
                finished, num_bytes = [], 0
    yield pa.Table.from_pylist(finished, schema=schema)


def answered_schema(family: Family) -> pa.Schema:
    """Columns of a converted row, which is a dead letter if it has a `step`."""
    return pa.schema([*family.table.schema, *FAILURE])


def _convert(
    row: dict[str, Any], family: Family, folder: Location, is_elsewhere: bool
) -> dict[str, Any]:
    """A row's values, where `images` says where the images are."""
    keys = {"id": row["id"], "row": row["row"]}
    if row["step"] is not None:
        return keys | {name: row[name] for name in ("step", "error", "reason")}
    step = "read"
    try:
        fields = row["kept"] if "kept" in row else parse_line(row["record"], "record")
        step = "convert"
        if fields.get("id") is not None:
            keys["id"] = _as_id(fields["id"])
        record = Record(fields=fields, attached=row.get("images") or [])
        values = family.convert(record)
        if values.get("id") is not None:
            keys["id"] = _as_id(values["id"])
        images = [_place(image, folder, is_elsewhere) for image in values["images"]]
    except DataError as error:
        return keys | failure(step, error)
    return values | keys | {"images": images, "step": None}


def _as_id(value: Any) -> str:
    return as_text(value if isinstance(value, str) else str(value), "id")


def _place(image: Any, folder: Location, is_elsewhere: bool) -> dict[str, bytes | None]:
    """An image as a record has it -> its bytes or its path, as `source.IMAGE`.

    Raises:
        DataError: the value is no image, or its path is not text.
    """
    if isinstance(image, bytes):
        return {"image": image, "path": None}
    if isinstance(image, dict):
        data = image.get("image", image.get("bytes"))
        if isinstance(data, bytes):
            return {"image": data, "path": None}
    reference = read_image_field(image)
    if reference is None:
        raise DataError("image is null; restore it")
    if reference.startswith("/") and is_elsewhere and not is_uri(reference):
        reference = os.path.basename(reference)
    try:
        path = resolve_path(os.fsencode(reference), os.fsencode(folder.path))
    except UnicodeEncodeError:
        raise DataError("image is a path with half a surrogate pair; correct it") from None
    return {"image": None, "path": path}


def _with_images(row: dict[str, Any], reader: ImageReader) -> dict[str, Any]:
    """The row with its images' bytes, each of which can be decoded."""
    if not row.get("images"):
        return row
    images, step = [], "read"
    try:
        for data in reader.read(row):
            step = "decode"
            decode_reduced(data, lambda size: (1, 1), reader.image_limits)
            images.append(data)
            step = "read"
    except DataError as error:
        return {"id": row["id"], "row": row["row"], **failure(step, error)}
    return row | {"images": images}
