"""Arrow columns of any layout -> plain ones, which all of Arrow's functions and Ray Data take.

A dictionary, a view or an extension is another layout of the same values: Arrow 26 can neither
filter a view nor take rows of one. What the columns mean does not matter here.
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
    """The same values in their plain layout."""
    return column.cast(plain_type(column.type))


def is_list(column_type: pa.DataType) -> bool:
    """Whether the type is a list, in any of Arrow's layouts."""
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
    """Whether all texts in the column, nested ones too, are UTF-8; Parquet does not ensure it."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def repair_text(array: pa.Array) -> pa.Array:
    """The same values, with U+FFFD for whatever is not UTF-8 in their texts, nested ones too."""
    array_type = array.type
    if isinstance(array_type, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(array_type, repair_text(array.storage))
    if types.is_dictionary(array_type):
        values = repair_text(array.dictionary)
        return pa.DictionaryArray.from_arrays(array.indices, values, ordered=array_type.ordered)
    if types.is_string(array_type) or types.is_large_string(array_type):
        texts = array.cast(pa.large_binary()).to_pylist()
        return pa.array([text and text.decode(errors="replace") for text in texts], array_type)
    if types.is_string_view(array_type):
        return repair_text(array.cast(pa.large_string())).cast(array_type)
    if types.is_struct(array_type):
        fields = [repair_text(array.field(n)) for n in range(array_type.num_fields)]
        return pa.StructArray.from_arrays(
            fields, fields=list(array_type.fields), mask=array.is_null()
        )
    if types.is_map(array_type):
        pairs = pa.StructArray.from_arrays(
            [repair_text(array.keys), repair_text(array.items)],
            fields=[array_type.key_field, array_type.item_field],
        )
        return _with_child(array, pairs)
    if is_list(array_type):
        return _with_child(array, repair_text(array.values))
    return array


def _with_child(array: pa.Array, child: pa.Array) -> pa.Array:
    """The lists of `array`, their values taken from `child`."""
    num_own = array.type.num_buffers
    return pa.Array.from_buffers(
        array.type, len(array), array.buffers()[:num_own], offset=array.offset, children=[child]
    )
