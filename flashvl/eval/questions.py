"""The questions of some benchmarks as the rows of one job, one benchmark after the other."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from flashvl.data.inputs.listing import list_files
from flashvl.data.inputs.rows import BYTES_PER_READ, ROWS_PER_READ, as_blocks, as_table
from flashvl.data.inputs.source import IMAGES, Done, Source
from flashvl.data.limits import ImageLimits
from flashvl.data.storage import Location
from flashvl.errors import ConfigError
from flashvl.eval.tasks.catalogue import TASKS
from flashvl.eval.tasks.task import DeadLetter, Item, Task, read_items
from flashvl.eval.tasks.tsv import Table, open_table

ENDINGS = tuple(f".tsv{end}" for end in ("", ".gz", ".bz2", ".xz"))
_PIECE = pa.schema(
    [
        ("benchmark", pa.int32()),
        ("rows", pa.list_(pa.int64())),
        ("places", pa.list_(pa.int64())),
    ]
)
"""Some questions of a benchmark: their numbers in the job, and in the benchmark's file."""
KEPT = pa.schema([("task", pa.string()), ("fields", pa.string())])
"""Columns that an answer keeps: the benchmark, and the question's cells as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A benchmark and its file."""

    name: str
    table: Table

    @property
    def task(self) -> Task:
        return TASKS[self.name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions(Source):
    """The questions of some benchmarks."""

    benchmarks: list[Benchmark]
    max_images: int

    @property
    def num_rows(self) -> int:
        return sum(len(each.table.asked) for each in self.benchmarks)

    @property
    def kept(self) -> pa.Schema:
        return KEPT

    def describe(self) -> str:
        return f"{', '.join(each.name for each in self.benchmarks)}: {self.max_images} image(s)"

    def read(self, is_done: Done) -> ray.data.Dataset:
        pieces = list(self._pieces(is_done))
        return ray.data.from_arrow(as_blocks(pieces, _PIECE)).map_batches(
            _read_pieces,
            fn_kwargs={"benchmarks": self.benchmarks, "max_images": self.max_images},
            batch_size=None,
            batch_format="pyarrow",
        )

    def _pieces(self, is_done: Done) -> Iterator[pa.Table]:
        first = 0
        for number, benchmark in enumerate(self.benchmarks):
            places = np.array(benchmark.table.asked, np.int64)
            left = np.flatnonzero(~is_done[first : first + len(places)])
            for start in range(0, len(left), ROWS_PER_READ):
                chosen = left[start : start + ROWS_PER_READ]
                piece = {
                    "benchmark": number,
                    "rows": (first + chosen).tolist(),
                    "places": places[chosen].tolist(),
                }
                yield pa.Table.from_pylist([piece], schema=_PIECE)
            first += len(places)

    def locate(self, row: int) -> tuple[Benchmark, int]:
        """The benchmark of a row, and the row's number in the benchmark's file."""
        for benchmark in self.benchmarks:
            if row < len(benchmark.table.asked):
                return benchmark, benchmark.table.asked[row]
            row -= len(benchmark.table.asked)
        raise IndexError(row)


def find_questions(
    data: str, tasks: Sequence[str], max_images: int, image_limits: ImageLimits
) -> Questions:
    """The questions of the benchmarks `tasks`, or of all whose files are in the folder `data`.

    Raises:
        ConfigError: a benchmark is unknown, or its file is missing or not readable.
    """
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ConfigError(
            f"there is no benchmark {unknown[0]!r}; name one of {', '.join(sorted(TASKS))}"
        )
    listing = list_files(data, "data", "name a folder of VLMEvalKit's TSV files")
    by_name = {}
    for file in listing.files:
        name = file.path.rpartition("/")[2]
        if ending := next((each for each in ENDINGS if name.endswith(each)), None):
            by_name[name.removesuffix(ending).removesuffix("_local")] = file
    names = [name for name in TASKS if name in tasks or not tasks]
    found = {name: by_name[TASKS[name].file] for name in names if TASKS[name].file in by_name}
    if missing := [name for name in tasks if name not in found]:
        raise ConfigError(
            f"data {data!r} lacks {TASKS[missing[0]].file}.tsv, the file of {missing[0]}; put it"
            " there, or leave the benchmark out"
        )
    if not found:
        raise ConfigError(
            f"data {data!r} holds no benchmark's file; put one there, such as"
            f" {TASKS['mmstar'].file}.tsv"
        )
    benchmarks = [
        Benchmark(
            name=name,
            table=open_table(
                Location(listing.root.store, file.path), image_limits, TASKS[name].is_asked
            ),
        )
        for name, file in found.items()
    ]
    return Questions(
        listing=listing.only(list(found.values())), benchmarks=benchmarks, max_images=max_images
    )


def _read_pieces(
    pieces: pa.Table, *, benchmarks: list[Benchmark], max_images: int
) -> Iterator[pa.Table]:
    """The questions of some pieces, a few at a time."""
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for piece in pieces.to_pylist():
        benchmark = benchmarks[piece["benchmark"]]
        items = read_items(benchmark.task, benchmark.table, piece["places"])
        for number, item in zip(piece["rows"], items, strict=True):
            row = _as_row(benchmark, item, max_images) | {"row": number}
            size = sum(len(image["image"]) for image in row["images"] or ())
            if rows and (len(rows) == ROWS_PER_READ or num_bytes + size > BYTES_PER_READ):
                yield as_table(rows, KEPT, [IMAGES], True)
                rows, num_bytes = [], 0
            rows.append(row)
            num_bytes += size
    if rows:
        yield as_table(rows, KEPT, [IMAGES], True)


def _as_row(benchmark: Benchmark, item: Item | DeadLetter, max_images: int) -> dict[str, Any]:
    """A row for `as_table`; a dead letter has a `problem`."""
    row: dict[str, Any] = {"id": f"{benchmark.name}/{item.id}", "images": None}
    if isinstance(item, DeadLetter):
        row["problem"] = item.reason
    else:
        row["images"] = [{"image": image} for image in item.images[:max_images]]
        row["prompt"] = item.prompt
    row["kept"] = {"task": benchmark.name, "fields": item.fields and json.dumps(item.fields)}
    return row
