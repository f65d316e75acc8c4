"""Tells a lost process or node, after which a stage goes on, from an error, which ends it."""

from ray.exceptions import RayError
from ray.train import TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from torch.distributed import DistError

from flashvl.errors import FlashVLError, one_line

BROKEN_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
"""Texts in the errors of ranks whose peer was lost."""


class RankError(Exception):
    """The error of one rank, with its traceback; the other ranks' are left out."""


def what_was_lost(error: BaseException) -> str:
    """The process or node whose loss ended an attempt.

    Raises:
        FlashVLError: a rank has ended the run by such an error.
        RankError: a rank has failed by any other error.
    """
    if isinstance(error, PreemptionError):
        return f"nodes of ranks {error.preemption_info.preempted_ranks} were taken away"
    if isinstance(error, WorkerGroupError):
        return _what_ranks_lost(error.worker_failures)
    if isinstance(error, ControllerError) and not isinstance(error.controller_failure, RayError):
        raise error
    if isinstance(error, RayError | ControllerError):
        return f"the process that controls the workers was lost ({_brief(error)})"
    raise error


def _what_ranks_lost(failures: dict[int, Exception]) -> str:
    lost = ""
    first: tuple[int, BaseException, str] | None = None
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "_base_exc", failure)  # Ray's wrapper of the function's error
        if isinstance(cause, FlashVLError):
            raise cause
        if _is_loss(cause):
            lost = lost or f"rank {rank} was lost, or a process that it needs: {_brief(cause)}"
        elif first is None:
            first = rank, cause, getattr(failure, "_traceback_str", str(failure))
    if first is not None:
        raise RankError(f"rank {first[0]} failed:\n{first[2]}") from None
    return lost or "the workers were lost"


def _brief(error: BaseException) -> str:
    """The first line of an error of Ray, whose others tell of possible causes."""
    return one_line(str(error).strip().partition("\n")[0] or type(error).__name__)


def _is_loss(error: BaseException) -> bool:
    if isinstance(error, RayError | DistError | ConnectionError):
        return True
    is_from_ray = type(error).__module__.startswith("ray.")
    return is_from_ray or any(text in str(error) for text in BROKEN_CONNECTION)


def is_fault_of_ray(error: BaseException) -> bool:
    """Whether an error of `TorchTrainer.fit` is one that `what_was_lost` explains."""
    return isinstance(error, TrainingFailedError | RayError)
