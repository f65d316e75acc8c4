"""The TSV files that VLMEvalKit defines: a row for each question, with its images.

The columns `index`, `question` and `answer` are in every file. An image is in `image`, as base64,
as a Python list of base64 texts, or as the `index` of the row that has the image; or it is a file,
or a list of files, named in `image_path`. Options are in columns `A`, `B` ... A cell is as pandas
writes it: in quotes where it holds a tab, a line break or a quote.

An empty cell, or `nan`, is one that the row does not have. Other words that pandas reads as
missing, such as the option `None`, are what they say, though VLMEvalKit loses them.

Images take most of a file, which may be larger than memory: a first pass only finds where the rows
are, and rows are read again one at a time.
"""

import ast
import csv
import posixpath
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from flashvl.data.fetching import decode_data_url
from flashvl.data.inputs.compressed import open_plain
from flashvl.data.limits import DEFAULT_LIMITS, ImageLimits
from flashvl.data.row_files import read_row_file
from flashvl.data.storage import Location, is_uri
from flashvl.errors import ConfigError, DataError

Fields = dict[str, str]
"""The cells of a row by column, without the column `image` and without cells that are empty."""

IMAGE_COLUMNS = ("image", "image_path")
LONGEST_REFERENCE = 64
"""Characters of a cell of `image` up to which it is another row's index."""
NUM_KEPT_IMAGES = 8
"""Cells of images that are kept in memory for the rows that refer to them."""
MISSING = ("", "nan", "NaN")


class MissingImageError(DataError):
    """A row has no image: VLMEvalKit leaves such rows out of a benchmark."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the file, or the reason why it cannot be used."""

    row: int
    """Number of the row in its file, from 0, the header not counted."""
    id: str
    """What is in the column `index`."""
    fields: Fields
    images: list[bytes]
    """Encoded images in their order."""
    problem: DataError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a row is in its file, and which row has its image."""

    begin: int
    id: str
    image_id: str | None
    has_image: bool
    """Whether a cell names an image, or whether the row is damaged, so that this is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A benchmark's file whose rows have been found."""

    location: Location
    columns: list[str]
    places: list[_Place]
    by_id: dict[str, int]
    """Row by its index; the last one where several have the same."""
    asked: list[int]
    """The rows that belong to the benchmark and have an image, or are damaged."""
    num_left_out: int
    """Rows of the benchmark without an image."""
    image_limits: ImageLimits

    @property
    def num_rows(self) -> int:
        return len(self.places)

    def rows(self, chosen: Iterable[int] | None = None) -> Iterator[Row]:
        """The rows in their order, or the chosen ones in the order given.

        Images are read and taken out of base64, but not decoded.
        """
        with open_plain(self.location) as (stream, _), open_plain(self.location) as (other, _):
            kept: OrderedDict[str, str] = OrderedDict()
            for row in range(self.num_rows) if chosen is None else chosen:
                yield self._read(row, stream, other, kept)

    def _read(
        self, row: int, stream: BinaryIO, other: BinaryIO, kept: OrderedDict[str, str]
    ) -> Row:
        fields: Fields = {}
        try:
            fields = self._fields(row, stream)
            images = self._images(row, fields, other, kept)
            problem = None
        except DataError as error:
            images, problem = [], error
        fields = {name: text for name, text in fields.items() if name != "image"}
        return Row(row=row, id=self.places[row].id, fields=fields, images=images, problem=problem)

    def _fields(self, row: int, stream: BinaryIO) -> Fields:
        """
        Raises:
            DataError: the row is damaged.
        """
        stream.seek(self.places[row].begin)
        cells, _, problem = next(_read_cells(stream))
        if problem is not None:
            raise DataError(problem)
        if len(cells) != len(self.columns):
            raise DataError(
                f"row has {len(cells)} cells and the header {len(self.columns)}; write the file"
                " anew, with quotes around cells that hold tabs, line breaks or quotes"
            )
        return _present(self.columns, cells)

    def _images(
        self, row: int, fields: Fields, other: BinaryIO, kept: OrderedDict[str, str]
    ) -> list[bytes]:
        """
        Raises:
            DataError: an image is missing, damaged or too large.
        """
        if "image" in fields:
            return [self._decode(text) for text in self._encoded(row, fields, other, kept)]
        if "image_path" in fields:
            return [self._read_file(path) for path in _as_list(fields["image_path"])]
        raise MissingImageError("row has no image; give it one, as base64 or as a path")

    def _encoded(
        self, row: int, fields: Fields, other: BinaryIO, kept: OrderedDict[str, str]
    ) -> list[str]:
        name = self.places[row].image_id
        if name is None:
            return _as_list(fields["image"])
        if name in kept:
            kept.move_to_end(name)
        else:
            kept[name] = self._referred(name, other)
            if len(kept) > NUM_KEPT_IMAGES:
                kept.popitem(last=False)
        return _as_list(kept[name])

    def _referred(self, name: str, other: BinaryIO) -> str:
        """The cell `image` of the row with this index.

        Raises:
            DataError: there is none, or it refers to another row in turn.
        """
        if name not in self.by_id:
            raise DataError(f"image refers to row {name!r}, which the file lacks; give the image")
        place = self.by_id[name]
        cell = self._fields(place, other).get("image")
        if cell is None or self.places[place].image_id is not None:
            raise DataError(f"image refers to row {name!r}, which has no image; give the image")
        return cell

    def _decode(self, text: str) -> bytes:
        return decode_data_url(f"data:;base64,{text}", self.image_limits.max_image_bytes)

    def _read_file(self, path: str) -> bytes:
        """The file of a path: absolute, or below the folder that VLMEvalKit keeps images in."""
        if not is_uri(path) and not posixpath.isabs(path):
            folder, name = posixpath.split(self.location.path)
            name = name.partition(".")[0].removesuffix("_local")
            path = posixpath.join(folder, "images", name, path)
        return read_row_file(path, self.location.store, self.image_limits.max_image_bytes)


def open_table(
    location: Location,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    is_asked: Callable[[Fields], bool] = lambda _: True,
) -> Table:
    """Find the rows of a benchmark's file, on a disk or in a store.

    Args:
        is_asked: whether a row of these cells belongs to the benchmark.

    Raises:
        ConfigError: there is no such file, or it is not a benchmark's.
    """
    if not location.is_file():
        raise ConfigError(f"benchmark {location} is not a file; name a TSV file of VLMEvalKit")
    with open_plain(location) as (stream, _):
        records = _read_cells(stream)
        header, begin, _ = next(records, ([], 0, None))
        columns = [name if len(name) == 1 else name.lower() for name in header]
        _check_columns(location, columns)
        places: list[_Place] = []
        asked, num_left_out = [], 0
        for cells, end, problem in records:
            if cells or problem is not None:
                is_whole = problem is None and len(cells) == len(columns)
                place = _place(columns, cells if is_whole else cells[:1], begin)
                if not is_whole or is_asked(_present(columns, cells)):
                    if place.has_image:
                        asked.append(len(places))
                    num_left_out += not place.has_image
                places.append(place)
            begin = end
    return Table(
        location=location,
        columns=columns,
        places=places,
        by_id={place.id: row for row, place in enumerate(places)},
        asked=asked,
        num_left_out=num_left_out,
        image_limits=image_limits,
    )


def _present(columns: list[str], cells: list[str]) -> Fields:
    """The cells that are there, by their columns."""
    pairs = zip(columns, cells, strict=False)
    return {name: text for name, text in pairs if text.strip() not in MISSING}


def _check_columns(location: Location, columns: list[str]) -> None:
    shown = ", ".join(columns)[:100]
    if missing := [name for name in ("index", "question") if name not in columns]:
        raise ConfigError(
            f"benchmark {location} has no column {missing[0]!r}; columns: {shown or 'none'}. Name a"
            " TSV file of VLMEvalKit"
        )
    if not set(columns).intersection(IMAGE_COLUMNS):
        raise ConfigError(
            f"benchmark {location} has neither a column 'image' nor 'image_path'; columns: {shown}."
            " Name a TSV file of VLMEvalKit"
        )


def _place(columns: list[str], cells: list[str], begin: int) -> _Place:
    fields = _present(columns, cells)
    image = fields.get("image", "")
    return _Place(
        begin=begin,
        id=fields.get("index", ""),
        image_id=image.strip() if 0 < len(image) <= LONGEST_REFERENCE else None,
        has_image=len(cells) != len(columns) or bool(set(IMAGE_COLUMNS) & set(fields)),
    )


def _read_cells(stream: BinaryIO) -> Iterator[tuple[list[str], int, str | None]]:
    """The records from the stream's position: cells, the place where the record ends, and what is
    wrong with it."""
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default is less than an image
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter="\t")
    while True:
        problem = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = [], f"row cannot be read ({error}); write the file anew"
        if lines.is_at_end:
            problem = (
                "a quote that this row opens is never closed: what the file holds from there on is"
                " lost; write the file anew"
            )
        elif not all(map(_is_text, cells)):
            problem = "row is not UTF-8; write the file as UTF-8"
        yield cells, lines.place, problem


class _Lines:
    """The lines of a file, as the CSV reader asks for them."""

    def __init__(self, stream: BinaryIO):
        self._stream, self.place = stream, stream.tell()
        self.is_at_end = False
        """Whether the reader has asked for a line after the last one."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        is_first = self.place == 0
        line = self._stream.readline()
        if not line:
            self.is_at_end = True
            raise StopIteration
        self.place += len(line)
        return line.decode("utf-8-sig" if is_first else "utf-8", errors="surrogateescape")


def _is_text(cell: str) -> bool:
    if cell.isascii():
        return True
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_list(cell: str) -> list[str]:
    """A cell that holds a value, or a Python list of values.

    Raises:
        DataError: the list is damaged.
    """
    cell = cell.strip()
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    values = read_list(cell)
    if not values:
        raise MissingImageError("row has an empty list of images; give it one")
    return values


def read_list(cell: str) -> list[str]:
    """The values of a Python list in a cell, as texts; a cell that is no list is its only value.

    Raises:
        DataError: the cell begins as a list and is none.
    """
    if not cell.strip().startswith("["):
        return [cell]
    try:
        values = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise DataError(f"cell {cell[:40]!r} is not a list; write it as ['...', '...']") from None
    return [str(value) for value in values]
