"""Columns that only go through, from the input to the output.

On their way they are one column, in plain types, as Ray Data knows but those.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from flashvl.data.plain import is_valid_text, plain_type, repair_text, to_plain
from flashvl.errors import ConfigError, one_line


def bundle(columns: pa.Table) -> pa.StructArray:
    """Columns -> one. What is no UTF-8 in a text is U+FFFD from here on: no reader takes it."""
    parts = []
    for column in columns.columns:
        part = pa.concat_arrays(to_plain(column).chunks or [pa.array([], plain_type(column.type))])
        parts.append(part if is_valid_text(part) else repair_text(part))
    names = columns.column_names
    fields = [pa.field(name, part.type) for name, part in zip(names, parts, strict=True)]
    return pa.StructArray.from_arrays(parts, fields=fields)


def unbundle(column: pa.ChunkedArray, schema: pa.Schema) -> pa.Table:
    """What `bundle` made -> the columns again, of the types that they had."""
    whole = pa.concat_arrays(column.chunks or [pa.array([], column.type)])
    return pa.table(whole.flatten(), names=[field.name for field in column.type]).cast(schema)


def check_keepable(schema: pa.Schema, source: str) -> None:
    """
    Raises:
        ConfigError: values of a column's type would not arrive as they are.
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
        TypeError: there is a list view in it, which Ray Data does not send to another process.
    """
    if types.is_list_view(column_type) or types.is_large_list_view(column_type):
        raise TypeError("Ray Data takes no list views; write it as a list")
    for number in range(column_type.num_fields):
        _check_views(column_type.field(number).type)
