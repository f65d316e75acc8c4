"""Arrow columns of whatever layout -> plain ones, which all of Arrow's functions and Ray Data take.

A dictionary, a view or an extension is another layout of the same values: Arrow 26 can neither
filter a view nor take rows of one. It does not know what the columns mean.
"""

import pyarrow as pa
import pyarrow.types as types


def plain_type(column_type: pa.DataType) -> pa.DataType:
    """The plain layout of the same values; `cast` goes there and back.

    Lists that are views stay as they are: Arrow 26 casts them wrongly.
    """
    if isinstance(column_type, pa.BaseExtensionType):
        return plain_type(column_type.storage_type)
    if types.is_dictionary(column_type):
        return plain_type(column_type.value_type)
    if types.is_string_view(column_type):
        return pa.large_string()
    if types.is_binary_view(column_type):
        return pa.large_binary()
    if types.is_struct(column_type):
        return pa.struct([_plain_field(field) for field in column_type.fields])
    if types.is_map(column_type):
        fields = _plain_field(column_type.key_field), _plain_field(column_type.item_field)
        return pa.map_(*fields, column_type.keys_sorted)
    if types.is_fixed_size_list(column_type):
        return pa.list_(_plain_field(column_type.value_field), column_type.list_size)
    if types.is_list(column_type):
        return pa.list_(_plain_field(column_type.value_field))
    if types.is_large_list(column_type):
        return pa.large_list(_plain_field(column_type.value_field))
    return column_type


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))


def to_plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return column.cast(plain_type(column.type))


def is_list(column_type: pa.DataType) -> bool:
    """Of whatever layout."""
    return any(
        test(column_type)
        for test in (
            types.is_list,
            types.is_large_list,
            types.is_fixed_size_list,
            types.is_list_view,
            types.is_large_list_view,
        )
    )


def is_valid_text(column: pa.Array | pa.ChunkedArray) -> bool:
    """All texts in it, however deep, are UTF-8: those who write Parquet need not see to it."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def mend_text(array: pa.Array) -> pa.Array:
    """The same with U+FFFD for what is no UTF-8 in its texts, however deep they are."""
    array_type = array.type
    if isinstance(array_type, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(array_type, mend_text(array.storage))
    if types.is_dictionary(array_type):
        values = mend_text(array.dictionary)
        return pa.DictionaryArray.from_arrays(array.indices, values, ordered=array_type.ordered)
    if types.is_string(array_type) or types.is_large_string(array_type):
        texts = array.cast(pa.large_binary()).to_pylist()
        return pa.array([text and text.decode(errors="replace") for text in texts], array_type)
    if types.is_string_view(array_type):
        return mend_text(array.cast(pa.large_string())).cast(array_type)
    if types.is_struct(array_type):
        fields = [mend_text(array.field(n)) for n in range(array_type.num_fields)]
        return pa.StructArray.from_arrays(
            fields, fields=list(array_type.fields), mask=array.is_null()
        )
    if types.is_map(array_type):
        pairs = pa.StructArray.from_arrays(
            [mend_text(array.keys), mend_text(array.items)],
            fields=[array_type.key_field, array_type.item_field],
        )
        return _with_child(array, pairs)
    if is_list(array_type):
        return _with_child(array, mend_text(array.values))
    return array


def _with_child(array: pa.Array, child: pa.Array) -> pa.Array:
    """The same lists of other values."""
    num_own = array.type.num_buffers
    return pa.Array.from_buffers(
        array.type, len(array), array.buffers()[:num_own], offset=array.offset, children=[child]
    )
