"""A contamination check's options: entry points parse them, and workers receive them."""

import os
from typing import Annotated

from pydantic import Field, field_validator

from flashvl.config import StrictModel
from flashvl.data.limits import ImageLimits


class ContaminationJob(StrictModel):
    """Tables for training, benchmarks that must not be in them, and the place for the result."""

    tables: Annotated[tuple[str, ...], Field(min_length=1)]
    """Table that training reads: its folder, file or URI, or a conversion's OUTPUT."""
    benchmarks: str
    """Folder or URI of VLMEvalKit's files (MMStar.tsv ...), which may be compressed."""
    output: str
    """Output folder or URI, outside the tables and the benchmarks: a new one, or one to resume."""
    tasks: tuple[str, ...] = ()
    """Benchmark, such as mmstar; by default all whose files are in the folder."""
    image_limits: ImageLimits = ImageLimits()
    """Sizes of images that are compared; training rows with others become dead letters."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of dead letters among the training rows above which the job stops; it also stops when
    all are dead letters, unless this is 1."""
    restart: bool = False
    """Throw away what the output holds of an earlier job; otherwise the job resumes."""

    @field_validator("output", "benchmarks", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value
