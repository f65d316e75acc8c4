"""Captions by the engines of a running service, so that one fleet does online and offline work.

The service is known by its name and by `flashvl.engine.remote` only.
"""

import asyncio
import logging
import random

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from flashvl.config import Dtype
from flashvl.engine import Completion, Request
from flashvl.engine.remote import DEPLOYMENT, ServedModel
from flashvl.errors import ConfigError, DataError
from flashvl.model import FlashVLProcessor

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 2.0
"""Bounds of the wait before a row is sent again that was turned away or whose replica was lost."""


class ServedEngine:
    """The engines of a Serve application; each row goes to whichever has room."""

    def __init__(self, application: str, processor: FlashVLProcessor):
        self.handle, self.processor = _handle(application), processor

    async def complete(self, request: Request) -> Completion:
        """Answer `request`, however long online requests come first.

        Raises:
            DataError: the request cannot be answered.
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
        """None: how full the engines are is not known here."""


def check_service(application: str, model: str, dtype: Dtype) -> None:
    """Check that a service can caption for a job with this model.

    Args:
        model: hash of the model's folder, by `flashvl.model.loading.hash_folder`.

    Raises:
        ConfigError: the application does not run on this cluster, or runs another model.
    """
    # Serve logs its inner workings in the driver.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = serve.status().applications.get(application)
    if running is None or running.status != ApplicationStatus.RUNNING:
        state = "is not there" if running is None else f"is {running.status.value}"
        raise ConfigError(
            f"via_serve: application {application!r} {state} on this cluster; deploy it, or leave"
            " the option out"
        )
    served: ServedModel = _handle(application).model.remote().result(timeout_s=60)
    if served != ServedModel(model, dtype):
        raise ConfigError(
            f"via_serve: application {application!r} has another model or dtype ({served.dtype})"
            f" than this job ({dtype}); give the same --model and --dtype"
        )


def _handle(application: str) -> DeploymentHandle:
    return serve.get_deployment_handle(DEPLOYMENT, application)
