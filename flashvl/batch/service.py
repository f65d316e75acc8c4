"""Captions by the engines of a running service, so that one fleet does online and offline work.

The service is known by its name and by `flashvl.engine.remote` only.
"""

import asyncio
import logging
import random

from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from flashvl.config import Dtype
from flashvl.engine import Completion, Request
from flashvl.engine.heartbeats import SILENCE_S, Heartbeat
from flashvl.engine.remote import DEPLOYMENT, ServedModel
from flashvl.errors import ConfigError
from flashvl.model import FlashVLProcessor

LOST = (RayActorError, ReplicaUnavailableError, AioRpcError)
"""Exceptions that mean that a replica is gone."""

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 2.0
"""Bounds of the wait before a row is sent again that was turned away or whose replica was lost."""


class ServedEngine:
    """The engines of a Serve application; each row goes to whichever has room."""

    def __init__(self, application: str, processor: FlashVLProcessor):
        self.rows = served_engines(application).options(stream=True)
        self.processor = processor

    async def complete(self, request: Request) -> Completion:
        """Answer `request`, however long online requests come first.

        Raises:
            DataError: the request cannot be answered.
        """
        pause_s = SHORTEST_PAUSE_S
        while True:
            try:
                completion = await self._ask(request)
                if completion is not None:
                    return completion
            except (*LOST, TimeoutError):
                pause_s = LONGEST_PAUSE_S
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _ask(self, request: Request) -> Completion | None:
        """What one replica answers.

        Raises:
            TimeoutError: the replica does not even send heartbeats.
        """
        items = self.rows.caption.remote(request)
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    item = await anext(items, None)
                if not isinstance(item, Heartbeat):
                    return item
        finally:
            items.cancel()

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
    served: ServedModel = served_engines(application).model.remote().result(timeout_s=60)
    if served != ServedModel(model, dtype):
        raise ConfigError(
            f"via_serve: application {application!r} has another model or dtype ({served.dtype})"
            f" than this job ({dtype}); give the same --model and --dtype"
        )


def served_engines(application: str) -> DeploymentHandle:
    """The handle of a service's engines."""
    return by_grpc(serve.get_deployment_handle(DEPLOYMENT, application))


def by_grpc(handle: DeploymentHandle) -> DeploymentHandle:
    """The handle whose calls go straight to a replica, by Serve's gRPC.

    A call that goes through Ray blocks all that the replica does until its caller has taken the
    answer: one caller that hangs would stop the service. And sending a token as a Ray object would
    cost more than generating it.
    """
    return handle.options(_by_reference=False)
