"""Which errors of Ray Train are losses that a stage survives, and which are told."""

import pickle

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from flashvl.errors import FlashVLError
from flashvl.train.run.failures import RankError, keep_traceback, what_was_lost


def raised_by(error: Exception) -> Exception:
    """What Ray Train reports of a rank whose function raised `error`: a copy by pickle."""
    try:
        raise error
    except Exception as caught:
        keep_traceback(caught)
        return pickle.loads(pickle.dumps(caught))


def group(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("", {int(rank[1:]): error for rank, error in failures.items()})


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        ControllerError(ActorDiedError()),
        ControllerError(WorkerGroupStartupFailedError("a node was lost")),
        group(r0=ActorDiedError()),
        group(r0=raised_by(RuntimeError("[gloo/transport/tcp] Connection closed by peer"))),
        group(
            r0=raised_by(RuntimeError("[gloo/transport/tcp] Connection closed by peer")),
            r1=ActorDiedError(),
        ),
        group(r0=raised_by(ActorDiedError())),
    ],
)
def test_a_lost_process_is_survived(error: Exception) -> None:
    assert "\n" not in what_was_lost(error)


def test_the_error_of_a_rank_counts_and_not_what_it_does_to_the_others() -> None:
    broken = raised_by(RuntimeError("[gloo/transport/tcp] Connection closed by peer"))
    with pytest.raises(RankError) as raised:
        what_was_lost(group(r0=broken, r2=raised_by(ValueError("wrong"))))
    told = str(raised.value)
    assert told.startswith("rank 2 failed:\nTraceback (most recent call last):")
    assert told.endswith("ValueError: wrong")
    with pytest.raises(FlashVLError, match="the disk is full"):
        what_was_lost(group(r0=broken, r1=raised_by(FlashVLError("the disk is full"))))


def test_an_error_of_a_feeds_task_is_no_loss() -> None:
    task = RayTaskError("read", "Traceback: ...", FlashVLError("the table is gone"))
    with pytest.raises(FlashVLError, match="the table is gone") as raised:
        what_was_lost(group(r0=raised_by(task)))
    assert "\n" not in str(raised.value)
    with pytest.raises(RankError, match="rank 0 failed"):
        what_was_lost(group(r0=raised_by(RayTaskError("read", "...", ValueError("wrong")))))


def test_an_error_of_ray_trains_controller_is_told() -> None:
    with pytest.raises(ControllerError):
        what_was_lost(ControllerError(ValueError("wrong")))
