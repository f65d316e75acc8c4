"""How a job that must stop finishes the rows under way and starts no others."""

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError


class Gate:
    """Actor that all engines of a job ask before they take rows."""

    def __init__(self) -> None:
        self._num_let_in = 0
        self._is_open = True

    def enter(self, num_rows: int) -> bool:
        """Whether `num_rows` more rows may be answered."""
        if self._is_open:
            self._num_let_in += num_rows
        return self._is_open

    def close(self) -> int:
        """Let no further rows in; returns the number of rows that were let in."""
        self._is_open = False
        return self._num_let_in


async def enter(gate: ActorHandle, num_rows: int) -> bool:
    """Call `Gate.enter`; a gate that was lost with its machine lets all rows in."""
    try:
        return await gate.enter.remote(num_rows)
    except RayActorError:
        return True


def close(gate: ActorHandle) -> int:
    """Call `Gate.close`; returns 0 where the gate was lost with its machine."""
    try:
        return ray.get(gate.close.remote())
    except RayActorError:
        return 0
