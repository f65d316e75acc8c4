"""A service on the Ray that an entry point has started."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from flashvl.errors import ConfigError
from flashvl.model.loading import load_processor, model_id
from flashvl.serve.app import build_app
from flashvl.serve.config import ServiceConfig
from flashvl.serve.listening import address_of
from flashvl.serve.stopping import StopSignals

APPLICATION = "flashvl"
POLL_S = 0.2
LAST_BYTES_S = 0.5
"""For Serve's proxy to send what it has of the last answers."""


@contextmanager
def deployed(config: ServiceConfig, host: str, port: int) -> Iterator[str]:
    """The application while it answers; yields its address.

    Raises:
        CheckpointError: the model will not do; nothing was deployed.
        ConfigError: Serve cannot listen there.
    """
    _check_deployable(config)
    try:
        yield _deploy(config, host, port)
    finally:
        serve.shutdown()


def serve_until_stopped(
    config: ServiceConfig,
    host: str,
    port: int,
    signals: StopSignals,
    tell: Callable[[str], None],
    *,
    is_ray_ours: bool,
) -> None:
    """Deploy the application and wait for a signal, then end it once it has answered.

    Args:
        signals: raise until the service answers.
        tell: is told where the service is, when it answers, and that it stops.
        is_ray_ours: Ray ends with this process, and Serve with it.

    Raises:
        CheckpointError: as `deployed`.
        ConfigError: as `deployed`.
        Stopped: a signal came before the service answered.
    """
    signals.install()
    _check_deployable(config)
    try:
        url = _deploy(config, host, port)
        signals.is_raising = False
        tell(f"{model_id(config.model)} answers at {url}")
        while not signals.count:
            time.sleep(POLL_S)
        tell("Stopping when what is under way is answered; the same again stops at once.")
        _drain(config.graceful_shutdown_timeout_s, signals)
    finally:
        signals.is_raising = False
        if not is_ray_ours:
            serve.shutdown()


def _check_deployable(config: ServiceConfig) -> None:
    """
    Raises:
        CheckpointError: the model will not do.
        ConfigError: the cluster has a Serve already, whose proxies listen where they do.
    """
    load_processor(config.model)
    if serve.status().proxies:
        raise ConfigError(
            "Serve runs on this cluster already; add this application by `serve deploy`, or end"
            " what runs by `serve shutdown`"
        )


def _deploy(config: ServiceConfig, host: str, port: int) -> str:
    """Start Serve and the application; returns its address.

    Raises:
        ConfigError: Serve cannot listen there.
    """
    # This process has nothing to tell; the service's own have their logs.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": host, "port": port})
    except (RayError, RuntimeError) as error:
        if "Failed to bind" not in str(error):
            raise
        raise ConfigError(
            f"Serve cannot listen at {address_of(host, port)}: another program has it on a node;"
            " choose another --port"
        ) from None
    serve.run(build_app(config), name=APPLICATION)
    return f"http://{address_of(host, port)}"


def _drain(grace_s: float, signals: StopSignals) -> None:
    """Have the requests under way end, in the time that they are given or that a signal leaves."""
    ingress = serve.get_app_handle(APPLICATION)
    ends = [ingress.drain.remote(grace_s)]
    while True:
        try:
            ends[-1].result(timeout_s=POLL_S)
            break
        except TimeoutError:
            if signals.count > len(ends):
                ends.append(ingress.drain.remote(0.0))
        except (RayError, RayServeException):
            return  # the ingress is gone, and its requests with it
    time.sleep(LAST_BYTES_S)
