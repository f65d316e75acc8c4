"""`/v1/batches`: captioning jobs of `flashvl.batch`, submitted to the same cluster as Ray jobs.

Ray keeps the list of jobs, so every ingress knows them all; a job's output tells how far it is.
"""

import contextlib
import json
import logging
import re
import shlex
import sys
import time
import uuid
from typing import Annotated, Any, Literal

import ray
from pydantic import Field, PositiveInt, StringConstraints
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from flashvl.batch.config import CaptionJob
from flashvl.batch.job import Plan, check_caption_job
from flashvl.batch.outputs import TABLES
from flashvl.config import DEFAULT_PROMPT, Replicas, validate
from flashvl.data.ledger.outputs import SUMMARY
from flashvl.data.ledger.tables import OutputTable
from flashvl.data.storage import is_below, locate
from flashvl.errors import FlashVLError
from flashvl.serve.config import ServiceConfig
from flashvl.serve.protocol import Answer, Closed, RequestError

logger = logging.getLogger("ray.serve")

SUBMIT_S = 30.0
"""Seconds within which the cluster must accept a job."""
DRIVER_CPUS = 0.1
"""Logical CPUs of a job's driver. With any, it runs on a node that has CPUs: where the head has
none, it survives the head."""

BATCH_ID = re.compile(r"batch-[0-9a-f]{32}")

PathOrURI = Annotated[
    str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f]+$")
]
BatchStatus = Literal["validating", "in_progress", "completed", "failed", "cancelled"]

STATUS: dict[JobStatus, BatchStatus] = {
    JobStatus.PENDING: "validating",
    JobStatus.RUNNING: "in_progress",
    JobStatus.SUCCEEDED: "completed",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "cancelled",
}


class BatchRequest(Closed):
    input: PathOrURI
    """Parquet, tars, JSON Lines or images, below one of the service's `batch_roots`."""
    output: PathOrURI
    """Output folder below one of the service's `batch_roots`: a new one, or one to resume."""
    prompt: Annotated[str, StringConstraints(max_length=100_000)] = DEFAULT_PROMPT
    """Question or instruction for every image."""
    prompt_column: str | None = None
    """Column with a prompt for each row, in place of `prompt`."""
    image_column: str | None = None
    """Column with the images; by default `image`, or the only column of bytes."""
    id_column: str | None = None
    """Column with an id for each row; by default `id`."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """Tokens of a caption at most."""
    replicas: Replicas = "1"
    """Engines of the job: their number, or MIN:MAX."""
    max_rows: PositiveInt | None = None
    """Rows to caption, the first ones; by default all."""


class RequestCounts(Answer):
    total: int
    """Rows to caption."""
    completed: int
    """Rows whose captions are on disk."""
    failed: int
    """Rows that are on disk as dead letters."""


class Batch(Answer):
    id: str
    object: Literal["batch"] = "batch"
    status: BatchStatus
    created_at: int | None
    """Time of the start, in seconds since 1970."""
    completed_at: int | None
    """Time of the end, in seconds since 1970."""
    request: BatchRequest
    request_counts: RequestCounts
    error: str | None = None
    """The reason of a failure."""


class BatchList(Answer):
    object: Literal["list"] = "list"
    data: list[Batch]


class Batches:
    """The cluster's batches. The methods wait for Ray and for stores: call them in a thread."""

    def __init__(self, config: ServiceConfig):
        self.config = config

    @property
    def _client(self) -> JobSubmissionClient:
        return JobSubmissionClient(ray.get_runtime_context().gcs_address)

    def create(self, request: BatchRequest) -> Batch:
        """Submit a job after checking that it can begin.

        Raises:
            RequestError: the input or the output cannot be used.
        """
        for name in ("input", "output"):
            place = getattr(request, name)
            is_absolute = place.startswith("/") or "://" in place
            # A glob finds nothing outside the folder that it begins with.
            if not is_absolute or not is_below(place, self.config.batch_roots):
                raise RequestError(
                    400, f"{name} must lie below one of the service's batch_roots", param=name
                )
        options = request.model_dump(exclude_none=True) | {
            "model": self.config.model,
            "dtype": self.config.dtype,
            "follow_paths": False,
        }
        try:
            plan = check_caption_job(validate(CaptionJob, options, source="batch"))
        except FlashVLError as error:
            raise RequestError(400, str(error)) from None
        batch_id = f"batch-{uuid.uuid4().hex}"
        self._submit(batch_id, shlex.join(_command(options)), _describe(request, plan))
        return self.get(batch_id)

    def _submit(self, batch_id: str, entrypoint: str, description: str) -> None:
        """Submit a job, trying again while the cluster's agents start.

        Raises:
            RequestError: the cluster has not accepted the job within `SUBMIT_S`.
        """
        deadline_s = time.monotonic() + SUBMIT_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=batch_id,
                    entrypoint_num_cpus=DRIVER_CPUS,
                    metadata={"flashvl": description},
                )
                return
            except (RuntimeError, ConnectionError) as error:
                if time.monotonic() > deadline_s:
                    logger.warning("batch %s was not submitted: %s", batch_id, error)
                    raise RequestError(
                        503, "the cluster takes no job at the moment", retry_after_s=10
                    ) from None
            time.sleep(1.0)

    def get(self, batch_id: str) -> Batch:
        """The batch with this id.

        Raises:
            RequestError: there is no batch with this id.
        """
        return self._as_batch(self._find(batch_id))

    def list(self) -> BatchList:
        """All batches, the newest first."""
        jobs = [job for job in self._client.list_jobs() if "flashvl" in (job.metadata or {})]
        jobs.sort(key=lambda job: job.start_time or 0, reverse=True)
        return BatchList(data=[self._as_batch(job) for job in jobs])

    def cancel(self, batch_id: str) -> Batch:
        """Stop the batch with this id, unless it has ended.

        Raises:
            RequestError: there is no batch with this id.
        """
        job = self._find(batch_id)
        if not job.status.is_terminal():
            self._client.stop_job(batch_id)
        return self.get(batch_id)

    def _find(self, batch_id: str) -> JobDetails:
        job = None
        # Ray's client puts an id into a URL unescaped, where `#` and `/` would mean something.
        if BATCH_ID.fullmatch(batch_id):
            with contextlib.suppress(RuntimeError):  # what the client raises for "not found"
                job = self._client.get_job_info(batch_id)
        if job is None or "flashvl" not in (job.metadata or {}):
            raise RequestError(404, f"no batch {batch_id[:100]!r}", param="batch_id")
        return job

    def _as_batch(self, job: JobDetails) -> Batch:
        told: dict[str, Any] = json.loads(job.metadata["flashvl"])
        output = locate(told["request"]["output"])
        captions, dead = (OutputTable(output / name).count_rows() for name in TABLES)
        status = STATUS[job.status]
        if status == "failed" and (output / SUMMARY).is_file():
            status = "completed"  # the job had finished when its driver was lost
        return Batch(
            id=job.submission_id,
            status=status,
            created_at=job.start_time and job.start_time // 1000,
            completed_at=job.end_time and job.end_time // 1000,
            request=told["request"],
            request_counts=RequestCounts(total=told["total"], completed=captions, failed=dead),
            error=self._why(job) if status == "failed" else None,
        )

    def _why(self, job: JobDetails) -> str:
        lines = self._client.get_job_logs(job.submission_id).splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else job.message or "its driver was lost"


def _describe(request: BatchRequest, plan: Plan) -> str:
    return json.dumps({"request": request.model_dump(), "total": plan.num_rows})


def _command(options: dict[str, Any]) -> list[str]:
    """The command line of `flashvl caption` with these options."""
    line = [sys.executable, "-m", "flashvl", "caption"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif name != "input":
            line += [f"--{flag}={value}"]
    return [*line, "--", options["input"]]
