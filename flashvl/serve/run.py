"""A service on a Ray cluster that an entry point has started or joined."""

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
"""Seconds for Serve's proxy to send the ends of the last answers."""


@contextmanager
def deployed(config: ServiceConfig, host: str, port: int) -> Iterator[str]:
    """Deploy the application, yield its URL, and end it with the `with` block.

    Raises:
        CheckpointError: the model cannot be used; nothing was deployed.
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
    """Deploy the application, wait for a signal, and end it when its requests are answered.

    Args:
        signals: raises `Stopped` until the service answers, and then counts.
        tell: prints a line for the user: the service's address, and later that it stops.
        is_ray_ours: whether Ray, and Serve with it, ends with this process.

    Raises:
        CheckpointError: the model cannot be used; nothing was deployed.
        ConfigError: Serve cannot listen there.
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
        tell("Stopping when the requests under way are answered; once more stops at once.")
        _drain(config.graceful_shutdown_timeout_s, signals)
    finally:
        signals.is_raising = False
        if not is_ray_ours:
            serve.shutdown()


def _check_deployable(config: ServiceConfig) -> None:
    """
    Raises:
        CheckpointError: the model cannot be used.
        ConfigError: the cluster runs Serve already, whose proxies keep their own host and port.
    """
    load_processor(config.model)
    if serve.status().proxies:
        raise ConfigError(
            "Serve runs on this cluster already; add this application by `serve deploy`, or end"
            " what runs by `serve shutdown`"
        )


def _deploy(config: ServiceConfig, host: str, port: int) -> str:
    """Start Serve and the application; returns its URL.

    Raises:
        ConfigError: Serve cannot listen there.
    """
    # The processes of the service have their logs; this one would only repeat them.
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
    """Let the requests under way end within `grace_s`, or at once after another signal."""
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
