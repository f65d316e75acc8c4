"""An evaluation's options: entry points parse them, and workers receive them."""

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from flashvl.batch.config import CaptionJob
from flashvl.config import Dtype, Replicas, StrictModel
from flashvl.data.limits import ImageLimits


class EvaluationJob(StrictModel):
    """Benchmarks, the model that they score, and the place for the results."""

    data: str
    """Folder or URI of VLMEvalKit's files (MMStar.tsv ...), which may be compressed."""
    output: str
    """Output folder or URI, outside the data: a new one, or one to resume."""
    tasks: tuple[str, ...] = ()
    """Benchmark, such as mmstar; by default all whose files are in the data."""
    model: str = "tiny"
    """Shipped model's name (tiny) or Flash-VL folder; commands also take a published FlashVL/* name
    or folder."""
    dtype: Dtype = "auto"
    """Number format of the model; auto: the machine's fastest. With float32, slower, an answer
    depends neither on the questions in the same batch nor on the machine."""
    max_new_tokens: PositiveInt = 512
    """Tokens of an answer at most."""
    max_images: PositiveInt = 1
    """Images of a question that the model sees, the first ones; the paper's figures are with 1."""
    max_num_seqs: PositiveInt = 64
    """Questions that an engine answers at the same time."""
    replicas: Replicas = "1"
    """Engines: their number, or MIN:MAX, between which their number follows the work."""
    gpus_per_replica: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each engine; with 0.5, two engines share a GPU, and 0 uses CPUs. By default one where
    the cluster has GPUs."""
    via_serve: str | None = None
    """Serve application (flashvl) whose engines answer, after their online requests."""
    judge_url: str | None = None
    """Base URL of an API like OpenAI's (http://HOST:PORT/v1) whose model marks answers that a
    benchmark's rule leaves open; without it, these count as wrong. OPENAI_API_KEY holds its key."""
    judge_model: str | None = None
    """Model's name at `judge_url`."""
    judge_replies: Path = Path("judge-replies.jsonl")
    """File that keeps a judge's replies, so that no question is asked twice."""
    image_limits: ImageLimits = ImageLimits()
    """Sizes of images that are shown; questions about others become dead letters."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of dead letters, which count as wrong, above which the job stops; it also stops when
    all questions are dead letters, unless this is 1."""
    restart: bool = False
    """Throw away what the output holds of an earlier job; otherwise the job resumes."""

    @field_validator("output", "data", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _judge_is_whole(self) -> Self:
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url and judge_model belong together; give both or neither")
        return self

    def as_caption_job(self) -> CaptionJob:
        """The job that asks the questions: to answer one is to caption its images by a prompt."""
        return CaptionJob(
            input=self.data,
            output=self.output,
            model=self.model,
            dtype=self.dtype,
            max_new_tokens=self.max_new_tokens,
            max_num_seqs=self.max_num_seqs,
            replicas=self.replicas,
            gpus_per_replica=self.gpus_per_replica,
            via_serve=self.via_serve,
            image_limits=self.image_limits,
            max_error_rate=self.max_error_rate,
            restart=self.restart,
        )
