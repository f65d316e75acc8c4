"""A finished job's report, one self-contained HTML file.

Totals, speed over time, lengths, a sample of pictures with their captions, dead letters by reason.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fsspec import AbstractFileSystem

from flashvl.batch.config import CaptionJob
from flashvl.data.images import decode_image, make_thumbnail
from flashvl.data.inputs.image_reader import ImageReader, without_kept
from flashvl.data.inputs.source import Source
from flashvl.data.ledger.outputs import OutputFolder
from flashvl.data.ledger.tables import written_between
from flashvl.data.limits import ImageLimits
from flashvl.errors import DataError

NUM_SAMPLES = 24
NUM_SAMPLE_FILES = 6
"""Files of captions from which the samples are taken; each may need a row group to be read."""
THUMBNAIL_SIDE = 320
"""Pixels of a thumbnail's longer side: twice what a card shows, for screens of high density."""
NUM_BARS = 40
"""Bars of a chart at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedImage:
    """A picture and its caption."""

    id: str
    caption: str
    picture: str
    """Thumbnail, as a data URI."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A bar of a chart."""

    label: str
    value: float
    share: float
    """Height as a share of the tallest bar's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetterGroup:
    """Dead letters of the same step and error."""

    step: str
    error: str
    count: int
    example_id: str
    example: str


def build_report(
    source: Source, job: CaptionJob, output: OutputFolder, summary: dict[str, Any]
) -> str:
    """The page of a job whose rows are all in `output`; Ray must be started."""
    return render_page(
        "flashvl.batch",
        summary=summary,
        output=str(output.folder),
        speed=_speed(output),
        lengths=_lengths(output),
        samples=_samples(source, job, output),
        reasons=_reasons(output),
    )


def render_page(package: str, **values: Any) -> str:
    """The `report.html.jinja` of a package, filled in with `values`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(values)


def _speed(output: OutputFolder) -> list[Bar]:
    """Rows a second over the job's time, which is cut into equal pieces."""
    spans = []
    for table in (output.results, output.dead_letters):
        for footer in table.footers():
            if footer.num_rows:
                spans.append((*written_between(footer), footer.num_rows))
    if not spans:
        return []
    starts, ends, rows = (np.array(column, float) for column in zip(*spans, strict=True))
    last = max(ends.max(), starts.min() + 1e-3)
    edges = np.linspace(starts.min(), last, NUM_BARS + 1)
    overlap = np.clip(
        np.minimum(ends[:, None], edges[None, 1:]) - np.maximum(starts[:, None], edges[None, :-1]),
        0,
        None,
    )
    rates = rows / np.maximum(ends - starts, 1e-3)
    values = (overlap * rates[:, None]).sum(0) / np.maximum(np.diff(edges), 1e-9)
    return _bars([str(timedelta(seconds=int(edge - edges[0]))) for edge in edges[:-1]], values)


def _lengths(output: OutputFolder) -> list[Bar]:
    """Number of captions by length in tokens."""
    counts = np.zeros(1, np.int64)
    for lengths in output.results.column("completion_tokens"):
        found = np.bincount(lengths, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    width = -(-len(counts) // NUM_BARS)
    counts = np.pad(counts, (0, -len(counts) % width)).reshape(-1, width).sum(1)
    firsts = np.arange(len(counts)) * width
    labels = [f"{n}" if width == 1 else f"{n} to {n + width - 1}" for n in firsts]
    return _bars(labels, counts)


def _bars(labels: list[str], values: npt.NDArray[Any]) -> list[Bar]:
    tallest = max(values.max(), 1e-9)
    return [
        Bar(label=label, value=float(value), share=float(value / tallest))
        for label, value in zip(labels, values, strict=True)
    ]


def _reasons(output: OutputFolder) -> list[DeadLetterGroup]:
    """Dead letters by step and error, the most frequent first, each with an example."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for columns in output.dead_letters.columns("step", "error", "id", "reason"):
        for step, error, row_id, reason in zip(*columns, strict=True):
            counts[step, error] += 1
            examples.setdefault((step, error), (str(row_id), reason))
    return [
        DeadLetterGroup(
            step=key[0],
            error=key[1],
            count=count,
            example_id=examples[key][0],
            example=examples[key][1],
        )
        for key, count in counts.most_common()
    ]


def _samples(source: Source, job: CaptionJob, output: OutputFolder) -> list[CaptionedImage]:
    """Captions at even distances in some files; Ray's tasks read their pictures again."""
    names = output.results.names()
    chosen = {names[n] for n in np.linspace(0, len(names) - 1, NUM_SAMPLE_FILES, dtype=int)}
    captions: dict[int, tuple[str, str]] = {}
    for name in sorted(chosen):
        ids, texts, rows = output.results.read(name, "id", "caption", "row")
        per_file = -(-NUM_SAMPLES // len(chosen))
        for n in np.unique(np.linspace(0, len(rows) - 1, per_file, dtype=int)) if len(rows) else ():
            captions[int(rows[n])] = ids[n], texts[n]
    if not captions:
        return []
    is_left_out = np.ones(source.num_rows, bool)
    is_left_out[list(captions)] = False
    pictures = source.read(is_left_out).map_batches(
        functools.partial(
            _draw, image_limits=job.image_limits, store=source.store, media_hosts=job.media_hosts
        ),
        batch_size=1,
        batch_format="pyarrow",
    )
    pictures.context.enable_progress_bars = False
    pictures.context.print_on_execution_start = False
    samples = []
    for row in sorted(pictures.take_all(), key=lambda row: row["row"]):
        row_id, caption = captions[row["row"]]
        samples.append(CaptionedImage(id=row_id, caption=caption, picture=row["picture"]))
    return samples


def _draw(
    rows: pa.Table,
    *,
    image_limits: ImageLimits,
    store: AbstractFileSystem,
    media_hosts: tuple[str, ...],
) -> pa.Table:
    drawn = []
    found = without_kept(rows).to_pylist()
    reader = ImageReader(found, image_limits, store, media_hosts)
    for row in found:
        try:
            image = decode_image(next(reader.read(row)), image_limits)
        except DataError:
            continue  # the image was readable when it was captioned
        drawn.append({"row": row["row"], "picture": make_thumbnail(image, THUMBNAIL_SIDE)})
    return pa.Table.from_pylist(
        drawn, schema=pa.schema([("row", pa.int64()), ("picture", pa.string())])
    )
