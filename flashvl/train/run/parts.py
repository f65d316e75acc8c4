"""Files that grow by a part at each checkpoint: the log of the steps, and the dead letters.

A part is named by the step of its checkpoint, so that a resumed run can remove what the steps that
it makes again have written.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flashvl.data.schema import DEAD_LETTERS
from flashvl.data.storage import Location

STEPS, DEAD = "steps", "dead_letters"
"""Folders of the two kinds of parts."""


def write_steps(output: Location, step: int, records: Sequence[dict[str, Any]]) -> None:
    """Write the records of the steps since the last checkpoint, a line of JSON each."""
    if records:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        _write(output / STEPS, f"part-{step:08d}.jsonl", lines.encode())


def write_dead(output: Location, step: int, dead: Sequence[dict[str, Any]]) -> None:
    """Write the dead letters since the last checkpoint, in the order of their rows."""
    if dead:
        rows = pa.Table.from_pylist(sorted(dead, key=lambda row: row["row"]), schema=DEAD_LETTERS)
        data = pa.BufferOutputStream()
        pq.write_table(rows, data)
        _write(output / DEAD, f"part-{step:08d}.parquet", data.getvalue().to_pybytes())


def remove_later(output: Location, step: int) -> None:
    """Remove the parts of checkpoints after `step`."""
    for folder in (output / STEPS, output / DEAD):
        for name in folder.names():
            number = re.match(r"part-(\d+)\.", name)
            if number is not None and int(number[1]) > step:
                (folder / name).remove()


def read_steps(output: Location) -> Iterator[dict[str, Any]]:
    """The records of all steps, part by part."""
    for name in (output / STEPS).names():
        if name.startswith("part-"):
            for line in (output / STEPS / name).read().splitlines():
                yield json.loads(line)


def _write(folder: Location, name: str, data: bytes) -> None:
    folder.make_folder()
    (folder / name).write(data)
