"""A conversion's options: entry points parse them, and workers receive them."""

import os
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from flashvl.config import StrictModel
from flashvl.data.limits import ImageLimits

FamilyName = Literal[
    "webdataset", "llava", "onevision", "tables", "reasoning", "preferences", "problems"
]


class ConversionJob(StrictModel):
    """What to convert, and where to write."""

    family: FamilyName
    """Layout of the data: webdataset (Infinity-MM), llava (LLaVA, ShareGPT4V, ALLaVA, MMDU),
    onevision, tables (questions and answers), reasoning, preferences (VLFeedback), problems."""
    input: str
    """Data: a file, folder, glob or {000..099} pattern; a path or URI (s3://, gs://, abfs://,
    hdfs://, hf://datasets/)."""
    output: str
    """Output folder or URI, outside the input: a new one, or one to resume."""
    images: str | None = None
    """Folder or URI in which the images are that rows name; by default the input's. An absolute
    path, which is another machine's, is then looked up there by its last part."""
    mapping: str | None = None
    """YAML file that says what the columns mean, for the family tables alone."""
    media_hosts: tuple[str, ...] = ()
    """Hosts (name, or name:port if not 443) from which image URLs in rows are fetched by https;
    rows with other URLs become dead letters."""
    image_limits: ImageLimits = ImageLimits()
    """Sizes of images that are taken; rows with others become dead letters."""
    max_rows: PositiveInt | None = None
    """First rows to convert, as a trial; the same job without this option converts the rest."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of dead letters above which the job stops; it also stops when all rows are dead
    letters, unless this is 1."""
    restart: bool = False
    """Throw away what the output holds of an earlier job; otherwise the job resumes."""
    append: bool = False
    """Also convert the files that were added to the input since; the others must be unchanged."""

    @field_validator("output")
    @classmethod
    def _can_be_written(cls, output: str) -> str:
        if output.startswith("hf://"):
            raise ValueError(
                "must not be on the hub, where each file is a commit; name another folder, and"
                " upload it when it is finished"
            )
        return output

    @field_validator("input", "output", "images", "mapping", mode="before")
    @classmethod
    def _as_text(cls, path: object) -> object:
        return os.fspath(path) if isinstance(path, os.PathLike) else path

    @model_validator(mode="after")
    def _adds_or_begins_anew(self) -> Self:
        if self.append and self.restart:
            raise ValueError("append keeps what restart throws away; leave out one of them")
        return self

    @model_validator(mode="after")
    def _has_a_mapping(self) -> Self:
        if (self.mapping is None) == (self.family == "tables"):
            raise ValueError(
                "the family tables needs a mapping, a YAML file as in ray_jobs/mappings, and no"
                " other family takes one"
            )
        return self
