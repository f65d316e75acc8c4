"""Tells a lost process or node, after which a stage goes on, from an error, which ends it."""

import traceback

from ray.exceptions import RayError, RayTaskError, UserCodeException
from ray.train import TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from torch.distributed import DistError

from flashvl.errors import FlashVLError, one_line

BROKEN_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
"""Texts in the errors of ranks whose peer was lost."""


class RankError(Exception):
    """The error of one rank, with its traceback; the other ranks' are left out."""


def is_of_ray(error: BaseException) -> bool:
    """Whether an error of `TorchTrainer.fit` is one that `what_was_lost` explains."""
    return isinstance(error, TrainingFailedError | RayError)


def what_was_lost(error: BaseException) -> str:
    """The process or node whose loss ended an attempt.

    Raises:
        FlashVLError: a rank has ended the run by such an error.
        RankError: a rank has failed by any other error.
    """
    if isinstance(error, PreemptionError):
        return f"the nodes of ranks {error.preemption_info.preempted_ranks} were taken away"
    if isinstance(error, WorkerGroupError):
        return _what_ranks_lost(error.worker_failures)
    failure = error.controller_failure if isinstance(error, ControllerError) else error
    if not _is_loss(failure):
        raise error
    return f"what controls the workers was lost: {_brief(failure)}"


def _what_ranks_lost(failures: dict[int, Exception]) -> str:
    lost = ""
    first: RankError | None = None
    for rank, failure in sorted(failures.items()):
        cause = _root(failure)
        if isinstance(cause, FlashVLError):
            raise cause from None
        if _is_loss(cause):
            lost = lost or f"rank {rank} was lost, or a process that it needs: {_brief(cause)}"
        elif first is None:
            first = RankError(f"rank {rank} failed:\n{_traceback_of(failure)}")
    if first is not None:
        raise first from None
    return lost or "the workers were lost"


def keep_traceback(error: BaseException) -> None:
    """Note an error's traceback in it; Ray Train hands on the error alone.

    It is the handler of the error that calls this.
    """
    error.add_note(traceback.format_exc())


def _traceback_of(error: BaseException) -> str:
    notes: list[str] = getattr(error, "__notes__", [])
    return notes[-1].strip() if notes else repr(error)


def _root(error: BaseException) -> BaseException:
    """The error beneath those by which Ray's tasks hand it on."""
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if inner is None or not isinstance(error, RayTaskError | UserCodeException):
            return error
        error = inner


def _is_loss(error: BaseException) -> bool:
    if isinstance(error, RayTaskError | UserCodeException):  # code of ours has failed
        return False
    is_of_ray = type(error).__module__.startswith("ray.")
    is_broken = any(text in str(error) for text in BROKEN_CONNECTION)
    return is_of_ray or is_broken or isinstance(error, DistError | ConnectionError)


def _brief(error: BaseException) -> str:
    """The first line of an error of Ray, whose others tell of possible causes."""
    return one_line(str(error).strip().partition("\n")[0] or type(error).__name__)
