"""What a captioning job is to do: what its entry points parse and its workers are told."""

import os
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from flashvl.config import DEFAULT_PROMPT, Dtype, Replicas, StrictModel
from flashvl.data.limits import ImageLimits
from flashvl.data.schema import IMAGE_MARKER


class CaptionJob(StrictModel):
    """What to caption, with what, and where to."""

    input: str
    """Parquet, tars, JSON Lines or images: a file, folder, glob or brace pattern; path or URI."""
    output: str
    """Folder that is new or empty, or holds a part of the same job, apart from the input; see
    `flashvl.batch.outputs`."""
    model: str = "tiny"
    """Shipped model's name, or a Flash-VL folder."""
    dtype: Dtype = "auto"
    """float32: a caption is the same whoever shares its batch, on any machine."""
    prompt: str = DEFAULT_PROMPT
    """Asked about every image, unless there is a `prompt_column`."""
    prompt_column: str | None = None
    """Holds a prompt for each row."""
    image_column: str | None = None
    """Holds bytes, `struct<bytes, path>`, paths, or lists of these, whose images are all in one
    prompt; by default `image`, or the only one of bytes."""
    id_column: str | None = None
    """By default `id`; without such a column, ids are made of file, row group and row."""
    follow_paths: bool = True
    """Read the image files that a table's rows name, wherever they are; else such rows are dead
    letters."""
    media_hosts: tuple[str, ...] = ()
    """Hosts, with their port unless it is 443, from which rows' image URLs are fetched by https;
    rows with other URLs are dead letters."""
    keep: tuple[str, ...] = ()
    """Columns that go through to the output as they are."""
    json_schema: str | None = None
    """A JSON schema, as text, that every caption is valid under, unless it ends by `length`."""
    max_new_tokens: PositiveInt = 64
    """Longer captions end here, with finish reason `length`."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: NonNegativeInt = 0
    """Of the sampling; with the row's place, so that no row's caption depends on the others."""
    max_num_seqs: PositiveInt = 64
    """Images that an engine captions at once."""
    replicas: Replicas = "1"
    """Engines: their number, or the least and the most, between which the pool follows the work."""
    gpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """Of an engine, where the cluster has GPUs; a part of one lets engines share it."""
    via_serve: str | None = None
    """Serve application whose engines are to caption, behind its online requests; `replicas` then
    are actors without an engine, each of which has so many rows under way as fill one."""
    limits: ImageLimits = ImageLimits()
    """Images outside these become dead letters."""
    limit: PositiveInt | None = None
    """Caption the first so many rows only, for a trial; without it, the job goes on behind them."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The job stops when more than this share of its rows, or all of them, are dead letters."""
    restart: bool = False
    """Throw away what the output holds of an earlier job; else that is gone on with."""

    append: bool = False
    """Caption what files hold that came to the input since; those that were there must be as they
    were, and their rows keep their places."""

    @field_validator("prompt")
    @classmethod
    def _has_no_marker(cls, prompt: str) -> str:
        if IMAGE_MARKER in prompt:
            raise ValueError(f"must not hold {IMAGE_MARKER}, which is put before it; leave it out")
        return prompt

    @field_validator("output")
    @classmethod
    def _can_be_written(cls, output: str) -> str:
        if output.startswith("hf://"):
            raise ValueError(
                "must not be on the hub, where each file is a commit; name another folder, and"
                " upload it when it is whole"
            )
        return output

    @model_validator(mode="after")
    def _adds_or_begins_anew(self) -> Self:
        if self.append and self.restart:
            raise ValueError("append keeps what restart throws away; leave out one of them")
        return self

    @field_validator("output", mode="before")
    @classmethod
    def _as_text(cls, output: object) -> object:
        return os.fspath(output) if isinstance(output, os.PathLike) else output
