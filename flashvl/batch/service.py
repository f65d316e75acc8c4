"""Captions by the replicas of a running service, so that one fleet does the online and the offline
work.

The service is known by its name only: `caption` of its deployment answers a `Request`, or with None
says that others come first.
"""

import asyncio
import logging
import random

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from flashvl.engine import Completion, Request
from flashvl.errors import ConfigError, DataError
from flashvl.model import FlashVLProcessor

DEPLOYMENT = "EngineReplica"
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 2.0
"""Before a row that was turned away, or whose replica was lost, is sent again."""


class ServedEngine:
    """The engines of an application, whichever has room."""

    def __init__(self, application: str, processor: FlashVLProcessor):
        self.handle, self.processor = _handle(application), processor

    async def complete(self, request: Request) -> Completion:
        """
        Raises:
            DataError: it cannot be answered.
        """
        pause_s = SHORTEST_PAUSE_S
        while True:
            try:
                completion = await self.handle.caption.remote(request)
                if completion is not None:
                    return completion
            except (RayActorError, ReplicaUnavailableError):
                pause_s = LONGEST_PAUSE_S
            except RayTaskError as error:
                if isinstance(error.cause, DataError):
                    raise DataError(str(error.cause)) from None
                raise
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def occupancy(self) -> None:
        """Not known here."""


def check_service(application: str, model: str, dtype: str) -> None:
    """
    Args:
        model: hash of the model's folder, by `flashvl.model.loading.hash_folder`.

    Raises:
        ConfigError: it does not run on this cluster, or runs another model.
    """
    # Serve tells drivers of its inner workings.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = serve.status().applications.get(application)
    if running is None or running.status != ApplicationStatus.RUNNING:
        state = "is not there" if running is None else f"is {running.status.value}"
        raise ConfigError(
            f"via_serve: application {application!r} {state} on this cluster; deploy it, or leave"
            " the option out"
        )
    served = _handle(application).model.remote().result(timeout_s=60)
    if served != (model, dtype):
        raise ConfigError(
            f"via_serve: application {application!r} has another model or dtype ({served[1]}) than"
            f" this job ({dtype}); give the same --model and --dtype"
        )


def _handle(application: str) -> DeploymentHandle:
    return serve.get_deployment_handle(DEPLOYMENT, application)
