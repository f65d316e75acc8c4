"""What a deployed engine offers to the captioning jobs of its cluster.

The service implements these methods, and the jobs call them. This module knows neither of the two,
and no Ray.
"""

from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol

from flashvl.config import Dtype
from flashvl.engine.heartbeats import Heartbeat
from flashvl.engine.request import Completion, Request

DEPLOYMENT = "EngineReplica"
"""Name of the Serve deployment whose replicas are engines."""


class ServedModel(NamedTuple):
    """The properties of an engine on which its captions depend."""

    folder_hash: str
    """Hash of the model's folder, by `flashvl.model.loading.hash_folder`."""
    dtype: Dtype
    """Number format as configured, not as chosen by `auto`."""


class RemoteEngine(Protocol):
    """The methods of a replica that jobs call through Serve's handle."""

    def caption(self, request: Request) -> AsyncGenerator[Completion | Heartbeat | None, None]:
        """Answer one row of a job; None, at once, where online requests need the room.

        Heartbeats come before the answer while it takes long.

        Raises:
            DataError: the request cannot be answered.
        """

    async def model(self) -> ServedModel:
        """The model that answers."""
