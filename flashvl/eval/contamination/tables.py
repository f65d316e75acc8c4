"""Tables that training reads, of any kind and number, as the rows of one job."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from flashvl.data.inputs.parquet import ParquetFiles
from flashvl.data.inputs.records import find_records
from flashvl.data.inputs.rows import ROWS_PER_READ
from flashvl.data.inputs.source import FAILURE, KEYS, Done, Source
from flashvl.data.inspection import TABLES, open_table
from flashvl.data.limits import ImageLimits
from flashvl.data.plain import is_list
from flashvl.data.schema import MESSAGES, is_binary
from flashvl.errors import ConfigError

ROWS = pa.schema(
    [
        *KEYS,
        ("table_row", pa.int64()),
        ("images", pa.list_(pa.large_binary())),
        ("texts", pa.list_(pa.large_string())),
        *FAILURE,
    ]
)
"""Rows of all tables: `row` counts through the tables, `table_row` is in the table's column `row`,
and `texts` holds what each turn says, and the answer that a reward compares with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTable:
    """A table and what its rows are called: conversations, preferences or prompts."""

    name: str
    kind: str
    source: Source


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTables(Source):
    """The rows of some tables, one table after the other."""

    tables: list[TrainingTable]

    @property
    def num_rows(self) -> int:
        return sum(table.source.num_rows for table in self.tables)

    @property
    def kept(self) -> pa.Schema:
        return pa.schema([])

    def describe(self) -> str:
        return ", ".join(f"{table.name} ({table.kind})" for table in self.tables)

    def read(self, is_done: Done) -> ray.data.Dataset:
        """The rows that are not done, as `ROWS`."""
        parts = []
        first = 0
        for table in self.tables:
            here = is_done[first : first + table.source.num_rows]
            if not here.all():
                parts.append(
                    table.source.read(here).map_batches(
                        _as_rows,
                        fn_kwargs={"kind": table.kind, "first_row": first},
                        batch_size=None,
                        batch_format="pyarrow",
                    )
                )
            first += table.source.num_rows
        return parts[0].union(*parts[1:]) if parts[1:] else parts[0]

    def name_of(self, row: int) -> str:
        """The table that a row is in."""
        for table in self.tables:
            if row < table.source.num_rows:
                return table.name
            row -= table.source.num_rows
        raise IndexError(row)


def find_tables(texts: Sequence[str], image_limits: ImageLimits) -> TrainingTables:
    """The tables that the texts name: folders, files, patterns, or outputs of conversions.

    Raises:
        ConfigError: there is no table, or it has none of the schemas that training reads.
    """
    tables = []
    for text in texts:
        opened = open_table(text)
        columns = TABLES[opened.kind].names
        source = find_records(
            opened.name, kinds=("parquet",), needed=columns, used=(), image_limits=image_limits
        )
        assert isinstance(source, ParquetFiles)
        images = source.tables[0].schema.field("images").type
        if not is_list(images) or not is_binary(images.value_type):
            raise ConfigError(
                f"table {text!r} has a column 'images' of type {images}, which must be lists of"
                " encoded images; make the table by flashvl data convert"
            )
        tables.append(TrainingTable(name=opened.name, kind=opened.kind, source=source))
    listing = tables[0].source.listing
    files = [file for table in tables for file in table.source.files]
    return TrainingTables(listing=listing.only(files), tables=tables)


def _as_rows(rows: pa.Table, *, kind: str, first_row: int) -> Iterator[pa.Table]:
    """The rows of a table, a few at a time, as `ROWS`."""
    for start in range(0, rows.num_rows, ROWS_PER_READ):
        part = rows.slice(start, ROWS_PER_READ)
        kept = part["kept"].combine_chunks()
        columns = {
            "id": part["id"],
            "row": pa.array(part["row"].to_numpy() + first_row),
            "table_row": kept.field("row"),
            "images": kept.field("images"),
            "texts": pa.array(_texts_of(kept, kind), ROWS.field("texts").type),
            **{field.name: part[field.name] for field in FAILURE},
        }
        yield pa.table([columns[name] for name in ROWS.names], names=ROWS.names).cast(ROWS)


def _texts_of(kept: pa.StructArray, kind: str) -> list[list[str]]:
    texts: list[list[str]] = [[] for _ in range(len(kept))]
    for field in TABLES[kind]:
        if field.type == MESSAGES:
            for found, messages in zip(texts, kept.field(field.name).to_pylist(), strict=True):
                found += [_content(message) for message in messages or ()]
        elif field.name == "answer":
            for found, answer in zip(texts, kept.field("answer").to_pylist(), strict=True):
                found.append(answer or "")
    return texts


def _content(message: dict[str, Any] | None) -> str:
    return (message or {}).get("content") or ""
