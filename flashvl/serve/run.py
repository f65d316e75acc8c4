"""A service on the Ray that an entry point has started."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import ray
from ray import serve

from flashvl.model.loading import load_processor, model_id
from flashvl.serve.app import build_app
from flashvl.serve.config import ServiceConfig

APPLICATION = "flashvl"


@contextmanager
def deployed(config: ServiceConfig, host: str, port: int) -> Iterator[str]:
    """The application while it answers; yields its address, and lets it finish what it has begun.

    Raises:
        CheckpointError: the model will not do; nothing was deployed.
    """
    load_processor(config.model)
    if not ray.cluster_resources().get("GPU"):
        config = config.model_copy(update={"gpus_per_replica": 0.0})
    # This process has nothing to tell; the service's own have their logs.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(build_app(config), name=APPLICATION)
        yield f"http://{host}:{port}"
    finally:
        serve.shutdown()


def serve_until_stopped(
    config: ServiceConfig, host: str, port: int, on_ready: Callable[[str], None]
) -> None:
    """Deploy the application and wait for Ctrl-C or SIGTERM, then end it once it has answered.

    Args:
        on_ready: is told where the service is, when it answers.

    Raises:
        CheckpointError: as `deployed`.
    """
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with deployed(config, host, port) as url:
            on_ready(f"{model_id(config.model)} answers at {url}")
            while not stopped.wait(1.0):  # a signal is handled between two waits
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
