"""What a table of conversations, preferences or prompts holds: counts, sizes and token lengths.

Rows are counted by the files' footers. All else is measured on a sample: whole row groups at even
distances, with about `SAMPLE_ROWS` rows.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flashvl.config import StrictModel
from flashvl.data.features import encode_conversation
from flashvl.data.images import read_header
from flashvl.data.inputs.listing import list_files
from flashvl.data.inputs.parquet import ParquetFile, read_footers
from flashvl.data.limits import DEFAULT_LIMITS
from flashvl.data.schema import CONVERSATIONS, PREFERENCES, PROMPTS
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError, DataError
from flashvl.model import FlashVLProcessor

SAMPLE_ROWS = 1024
"""Rows that are measured, about, where the table has as many."""
MANY_TOKENS = 2**40
"""Length that no conversation exceeds, as none is refused here."""
TABLES = {"conversations": CONVERSATIONS, "preferences": PREFERENCES, "prompts": PROMPTS}
"""Schemas that are known, by the names that conversions give to their folders."""
MAX_SOURCES = 20
"""Sources that a description names, the most frequent first."""


class Distribution(StrictModel):
    """How values are spread."""

    mean: float
    least: float
    p5: float
    median: float
    p95: float
    p99: float
    greatest: float


class Inspection(StrictModel):
    """What is in a table."""

    table: str
    kind: str
    """Schema: conversations, preferences or prompts."""
    files: int
    row_groups: int
    rows: int
    bytes: int
    """Size of the files."""
    sampled_rows: int
    """Rows that the following figures are about."""
    roles: dict[str, int]
    """Turns by role."""
    turns: Distribution | None
    """Turns of a row; None: no row was sampled, here and below."""
    images: dict[int, int]
    """Rows by their number of images."""
    formats: dict[str, int]
    """Images by media type."""
    image_bytes: Distribution | None
    image_pixels: Distribution | None
    """Width x height of an image."""
    tokens: Distribution | None
    """Tokens of a row, those of its images included, with the model's processor."""
    token_histogram: dict[str, int]
    """Rows by their number of tokens, in classes that double."""
    sources: dict[str, int]
    """Rows by the column `source`, where the table has it."""
    unusable: int
    """Rows that training could not use."""
    example: str | None
    """Reason of the first of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table that training reads, as its footers describe it."""

    name: str
    kind: str
    folder: Location
    files: list[ParquetFile]
    num_bytes: int

    @property
    def num_rows(self) -> int:
        return sum(sum(file.row_groups) for file in self.files)


def open_table(text: str) -> Table:
    """The table that `text` names: a folder, a file, a pattern, or the output of a conversion.

    Raises:
        ConfigError: there is no table there, or it has none of the schemas that training reads.
    """
    folder = locate(text)
    for name in TABLES:
        if (folder / name).is_folder():
            text = f"{text.rstrip('/')}/{name}"
            break
    listing = list_files(text)
    listing = listing.only([file for file in listing.files if file.path.endswith(".parquet")])
    if not listing.files:
        raise ConfigError(f"table {text!r} holds no *.parquet; name a table's folder")
    files = read_footers(listing)
    names = set(files[0].schema.names)
    kind = next((kind for kind, schema in TABLES.items() if set(schema.names) <= names), None)
    if kind is None:
        wanted = "; ".join(f"{kind}: {', '.join(schema.names)}" for kind, schema in TABLES.items())
        raise ConfigError(
            f"{files[0].path} has the columns {', '.join(sorted(names))}, which are no schema that"
            f" training reads ({wanted}); convert it with flashvl data convert"
        )
    num_bytes = sum(file.size for file in listing.files)
    return Table(name=text, kind=kind, folder=listing.root, files=files, num_bytes=num_bytes)


def sample_rows(table: Table, num_rows: int = SAMPLE_ROWS) -> Iterator[dict[str, Any]]:
    """The rows of some row groups at even distances, about `num_rows` in all."""
    groups = [
        (file, group, count)
        for file in table.files
        for group, count in enumerate(file.row_groups)
        if count
    ]
    if not groups:
        return
    mean = table.num_rows / len(groups)
    count = min(len(groups), -(-num_rows // max(int(mean), 1)))
    columns = TABLES[table.kind].names
    for number in np.unique(np.linspace(0, len(groups) - 1, count, dtype=int)):
        file, group, _ = groups[number]
        names = [*columns, *({"source"} & set(file.schema.names))]
        location = Location(table.folder.store, file.path)
        try:
            with location.open() as opened, pq.ParquetFile(opened) as parquet:
                yield from parquet.read_row_group(group, columns=names).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(f"{file.path} cannot be read ({error}); replace it") from None


def whole_conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a row of any of `TABLES`: a prompt with its better or expected answer."""
    if "messages" in row:
        return list(row["messages"])
    answer = row.get("chosen") or [{"role": "assistant", "content": row.get("answer") or ""}]
    return [*row["prompt"], *answer]


def inspect_table(
    table: Table, rows: Sequence[dict[str, Any]], processor: FlashVLProcessor
) -> Inspection:
    """Measure some rows of a table.

    Args:
        rows: as from `sample_rows`.
        processor: processor of the model that is to be trained.
    """
    roles: Counter[str] = Counter()
    images: Counter[int] = Counter()
    formats: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    turns, num_bytes, pixels, tokens = [], [], [], []
    problems = []
    rule = processor.image_processor.tiling_rule
    for row in rows:
        messages = whole_conversation(row)
        roles.update(message["role"] for message in messages)
        turns.append(len(messages))
        images[len(row["images"])] += 1
        if row.get("source") is not None:
            sources[row["source"]] += 1
        try:
            headers = [read_header(image, DEFAULT_LIMITS) for image in row["images"]]
            counts = [rule.num_tiles(header.size) for header in headers]
            input_ids, _ = encode_conversation(messages, counts, processor, MANY_TOKENS)
        except DataError as error:
            problems.append(f"row {row['row']}: {error}")
            continue
        formats.update(header.media_type for header in headers)
        num_bytes += [len(image) for image in row["images"]]
        pixels += [header.size[0] * header.size[1] for header in headers]
        tokens.append(len(input_ids))
    return Inspection(
        table=table.name,
        kind=table.kind,
        files=len(table.files),
        row_groups=sum(len(file.row_groups) for file in table.files),
        rows=table.num_rows,
        bytes=table.num_bytes,
        sampled_rows=len(rows),
        roles=dict(roles.most_common()),
        turns=_spread(turns),
        images=dict(sorted(images.items())),
        formats=dict(formats.most_common()),
        image_bytes=_spread(num_bytes),
        image_pixels=_spread(pixels),
        tokens=_spread(tokens),
        token_histogram=_histogram(tokens),
        sources=dict(sources.most_common(MAX_SOURCES)),
        unusable=len(problems),
        example=problems[0] if problems else None,
    )


def _spread(values: Sequence[int]) -> Distribution | None:
    if not values:
        return None
    least, p5, median, p95, p99, greatest = np.percentile(values, [0, 5, 50, 95, 99, 100]).tolist()
    return Distribution(
        mean=round(float(np.mean(values)), 1),
        least=least,
        p5=round(p5, 1),
        median=median,
        p95=round(p95, 1),
        p99=round(p99, 1),
        greatest=greatest,
    )


def _histogram(values: Sequence[int]) -> dict[str, int]:
    """Counts of values in classes that end at powers of two, from the first to the last in use."""
    exponents = Counter(max(value - 1, 0).bit_length() for value in values)
    if not exponents:
        return {}
    return {
        f"up to {2**exponent}": exponents[exponent]
        for exponent in range(min(exponents), max(exponents) + 1)
    }


def describe(inspection: Inspection) -> str:
    """The inspection for people."""
    found = inspection
    lines = [
        ("table", f"{found.table} ({found.kind})"),
        ("rows", f"{found.rows:,} in {found.files:,} files, {found.row_groups:,} row groups"),
        ("size", _size(found.bytes)),
        ("sampled", f"{found.sampled_rows:,} rows, which the rest is about"),
        ("roles", _counts(found.roles)),
        ("turns a row", _told(found.turns)),
        ("images a row", ", ".join(f"{n}: {count:,}" for n, count in found.images.items())),
        ("formats", _counts(found.formats)),
        ("image bytes", _told(found.image_bytes)),
        ("image pixels", _told(found.image_pixels)),
        ("tokens a row", _told(found.tokens)),
        ("sources", _counts(found.sources)),
        ("unusable", f"{found.unusable}" + (f", as {found.example}" if found.example else "")),
    ]
    text = "\n".join(f"{name:<16}{value}" for name, value in lines if value)
    most = max(found.token_histogram.values(), default=1)
    bars = (
        f"  {label:<14}{count:>8,} {'#' * round(40 * count / most)}".rstrip()
        for label, count in found.token_histogram.items()
    )
    return "\n".join([text, *bars])


def _told(spread: Distribution | None) -> str:
    if spread is None:
        return ""
    return (
        f"mean {spread.mean:,.0f}, 5% {spread.p5:,.0f}, median {spread.median:,.0f},"
        f" 95% {spread.p95:,.0f}, 99% {spread.p99:,.0f}, most {spread.greatest:,.0f}"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.2f} MB"
