"""How a job that must stop ends what is in flight and begins no more."""

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError


class Gate:
    """An actor that the engines ask before they take rows; one for all engines of a job."""

    def __init__(self) -> None:
        self._num_let_in = 0
        self._is_open = True

    def enter(self, num_rows: int) -> bool:
        """May so many rows be answered?"""
        if self._is_open:
            self._num_let_in += num_rows
        return self._is_open

    def close(self) -> int:
        """Let no more in; returns how many were."""
        self._is_open = False
        return self._num_let_in


async def enter(gate: ActorHandle, num_rows: int) -> bool:
    """As `Gate.enter`; a gate that was lost with its machine stands open."""
    try:
        return await gate.enter.remote(num_rows)
    except RayActorError:
        return True


def close(gate: ActorHandle) -> int:
    """As `Gate.close`; 0 where the gate was lost with its machine."""
    try:
        return ray.get(gate.close.remote())
    except RayActorError:
        return 0
