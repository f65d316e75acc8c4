"""Columns that are copied from the input to the output.

On their way they are one column of plain types, the only ones that Ray Data knows.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from flashvl.data.plain import is_valid_text, plain_type, repair_text, to_plain
from flashvl.errors import ConfigError, one_line


def bundle(columns: pa.Table) -> pa.StructArray:
    """Columns -> one. Text that is not UTF-8, which no reader accepts, becomes U+FFFD there."""
    parts = []
    for column in columns.columns:
        part = pa.concat_arrays(to_plain(column).chunks or [pa.array([], plain_type(column.type))])
        parts.append(part if is_valid_text(part) else repair_text(part))
    names = columns.column_names
    fields = [pa.field(name, part.type) for name, part in zip(names, parts, strict=True)]
    return pa.StructArray.from_arrays(parts, fields=fields)


def unbundle(column: pa.ChunkedArray, schema: pa.Schema) -> pa.Table:
    """The column that `bundle` made -> the columns again, of the types in `schema`."""
    whole = pa.concat_arrays(column.chunks or [pa.array([], column.type)])
    return pa.table(whole.flatten(), names=[field.name for field in column.type]).cast(schema)


def check_keepable(schema: pa.Schema, source: str) -> None:
    """Refuse columns whose values would reach the output changed.

    Raises:
        ConfigError: a column's type cannot be kept.
    """
    for field in schema:
        field = field.with_nullable(True)
        try:
            _check_views(field.type)
            column = pa.table({field.name: pa.nulls(2, field.type)})
            bundled = pa.chunked_array([bundle(column)]).filter(pa.array([True, False]))
            arrived = unbundle(bundled, pa.schema([field]))
            file = pa.BufferOutputStream()
            pq.write_table(arrived, file)
            written = pq.read_schema(pa.BufferReader(file.getvalue()))
        except (pa.ArrowException, TypeError, ValueError) as error:
            reason = one_line(error)
        else:
            if written.field(field.name).type == field.type:
                continue
            reason = f"it would be {written.field(field.name).type}"
        raise ConfigError(
            f"{source}: column {field.name!r} of type {field.type} cannot be kept ({reason});"
            " leave it out of --keep"
        )


def _check_views(column_type: pa.DataType) -> None:
    """
    Raises:
        TypeError: the type holds a list view, which Ray Data cannot send to another process.
    """
    if types.is_list_view(column_type) or types.is_large_list_view(column_type):
        raise TypeError("Ray Data cannot send list views; write it as a list")
    for number in range(column_type.num_fields):
        _check_views(column_type.field(number).type)
