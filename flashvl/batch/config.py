"""A captioning job's options: entry points parse them, and workers receive them."""

import os
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from flashvl.config import DEFAULT_PROMPT, Dtype, Replicas, StrictModel
from flashvl.data.limits import ImageLimits


class CaptionJob(StrictModel):
    """What to caption, with which model, and where to write."""

    input: str
    """Images: Parquet, tars (WebDataset), JSON Lines or image files. A file, folder, glob or
    {000..099} pattern; a path or URI (s3://, gs://, abfs://, hdfs://, hf://datasets/)."""
    output: str
    """Output folder or URI, outside the input: a new one, or one to resume."""
    model: str = "tiny"
    """Shipped model's name (tiny) or Flash-VL folder; commands also take a published FlashVL/* name
    or folder."""
    dtype: Dtype = "auto"
    """Number format of the model; auto: the machine's fastest. With float32, slower, a caption
    depends neither on the images in the same batch nor on the machine."""
    prompt: str = DEFAULT_PROMPT
    """Question or instruction for every image."""
    prompt_column: str | None = None
    """Column with a prompt for each row, in place of `prompt`; in tars, txt or json.FIELD."""
    image_column: str | None = None
    """Column of images: bytes, struct<bytes, path>, paths, URLs or (JSON) base64, or lists of these
    for one prompt; by default image, or the only column of bytes. In tars, a name's ending such as
    jpg; by default every image."""
    id_column: str | None = None
    """Column with an id for each row; by default id. Without such a column, ids are made of file,
    row group and row; in tars, they are the samples' keys."""
    follow_paths: bool = True
    """Read the image files that a table's rows name, wherever they are; otherwise such rows become
    dead letters."""
    media_hosts: tuple[str, ...] = ()
    """Hosts (name, or name:port if not 443) from which image URLs in rows are fetched by https;
    rows with other URLs become dead letters."""
    keep: tuple[str, ...] = ()
    """Columns to copy from the input to the output."""
    json_schema: str | None = None
    """JSON schema, as text, under which every caption is valid unless it is cut at
    `max_new_tokens`."""
    max_new_tokens: PositiveInt = 64
    """Tokens of a caption at most; one that is cut there has the finish reason length."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability of the likeliest tokens together, among which sampling chooses; 1: all tokens."""
    seed: NonNegativeInt = 0
    """Random seed for sampling; a row's number is added, so that no caption depends on other
    rows."""
    max_num_seqs: PositiveInt = 64
    """Images that an engine captions at the same time."""
    replicas: Replicas = "1"
    """Engines: their number, or MIN:MAX, between which their number follows the work."""
    gpus_per_replica: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each engine; with 0.5, two engines share a GPU, and 0 uses CPUs. By default one where
    the cluster has GPUs."""
    via_serve: str | None = None
    """Serve application (flashvl) whose engines caption, after their online requests; `replicas`
    then counts the actors that send images, each enough to fill an engine."""
    image_limits: ImageLimits = ImageLimits()
    """Sizes of images that are captioned; others become dead letters."""
    max_rows: PositiveInt | None = None
    """First rows to caption, as a trial; the same job without this option captions the rest."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of dead letters above which the job stops; it also stops when all rows are dead
    letters, unless this is 1."""
    restart: bool = False
    """Throw away what the output holds of an earlier job; otherwise the job resumes."""
    append: bool = False
    """Also caption the files that were added to the input since; the others must be unchanged."""

    @field_validator("prompt")
    @classmethod
    def _has_no_marker(cls, prompt: str) -> str:
        from flashvl.data.schema import IMAGE_MARKER  # with pyarrow, too heavy for a command line

        if IMAGE_MARKER in prompt:
            raise ValueError(
                f"must not hold {IMAGE_MARKER}, which is put before the prompt; leave it out"
            )
        return prompt

    @field_validator("output")
    @classmethod
    def _can_be_written(cls, output: str) -> str:
        if output.startswith("hf://"):
            raise ValueError(
                "must not be on the hub, where each file is a commit; name another folder, and"
                " upload it when it is finished"
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
