"""What a family of data sets gives to the conversion."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from flashvl.data.ledger.tables import TableSpec
from flashvl.data.schema import CONVERSATIONS, PREFERENCES, PROMPTS

ROWS_PER_GROUP = 64
"""Rows of a Parquet row group: training shuffles row groups, so small ones mix well."""


def _table(name: str, schema: pa.Schema) -> TableSpec:
    """A table of results, with the id and the source of each row beside the schema's columns."""
    return TableSpec(
        name=name,
        schema=pa.schema([("id", pa.string()), *schema, ("source", pa.string())]),
        # A dictionary of images or texts would only be tried and given up.
        parquet_options={"row_group_size": ROWS_PER_GROUP, "use_dictionary": ["source"]},
    )


CONVERSATIONS_TABLE = _table("conversations", CONVERSATIONS)
PREFERENCES_TABLE = _table("preferences", PREFERENCES)
PROMPTS_TABLE = _table("prompts", PROMPTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A row of the input."""

    fields: dict[str, Any]
    """Values by name: JSON's, or those of a Parquet table."""
    attached: list[dict[str, Any]]
    """Images that came with the row, in the order of its file, as `source.IMAGE`."""


Converted = dict[str, Any]
"""Values of the table's columns, without `row`. `images` holds paths, URLs, bytes, Hugging Face's
`{"bytes", "path"}`, or `source.IMAGE`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Data sets of one layout."""

    table: TableSpec
    kinds: tuple[str, ...]
    """Kinds of files that are read, by their names in `records.KINDS`; the first one wins."""
    needed: tuple[str, ...]
    """Fields without which the input is of another family."""
    used: tuple[str, ...]
    """Further fields that are read, where records have them."""
    convert: Callable[[Record], Converted]
    """Raises `DataError` for a row that cannot be used."""
