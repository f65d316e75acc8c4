"""The Serve application: an ingress that speaks HTTP, and replicas of the engine.

`serve deploy serve_configs/tiny.yaml` builds it by `flashvl.serve.app:build_app`. When Serve
replaces or removes a replica, it lets its requests end within `graceful_shutdown_timeout_s`;
`serve shutdown` ends Serve's proxies at once, and all requests under way with them.
"""

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from flashvl.batch.gpus import engine_environment, gpus_per_engine, warn_of_missing_gpus
from flashvl.config import pool_of
from flashvl.engine.remote import DEPLOYMENT
from flashvl.model.parts.prepare import prepare_model
from flashvl.serve import scaling
from flashvl.serve.api import make_api
from flashvl.serve.config import ServiceConfig
from flashvl.serve.dispatch import Engines
from flashvl.serve.replica import EngineReplica
from flashvl.serve.traffic import Traffic

UNBOUNDED = 100_000
"""Requests that Serve sends to a replica at once; the replica itself refuses those for which it has
no room."""
HEAD = "node:__internal_head__"
"""Resource that Ray gives to a cluster's head node."""


@serve.ingress()
class Ingress:
    """The deployment that reads HTTP requests and hands them on to the engines."""

    def __init__(self, config: ServiceConfig, engines: DeploymentHandle):
        self.config = config
        self.traffic = Traffic()
        self.engines = Engines(engines, config.request_timeout_s, self.traffic)

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = make_api(self.config, self.engines)
        gc.freeze()  # for the same reason as in `EngineReplica`
        return api

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, and wait for those under way, as `Traffic.drain` says."""
        await self.traffic.drain(grace_s)


def build_app(config: ServiceConfig) -> serve.Application:
    """The application for one model; `serve.run` and the files in `serve_configs/` use it."""
    num_gpus = gpus_per_engine(config.gpus_per_replica)
    decided = {"model": str(prepare_model(config.model)), "gpus_per_replica": num_gpus}
    config = config.model_copy(update=decided)
    least, most = pool_of(config.replicas)
    warn_of_missing_gpus(num_gpus)
    number: dict[str, Any] = {"num_replicas": least}
    if least < most:
        number["num_replicas"] = None
        number["autoscaling_config"] = AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=scaling.TARGET_SHARE * config.max_num_seqs,
            metrics_interval_s=1.0,
            look_back_period_s=scaling.LOOK_BACK_PERIOD_S,
            upscale_delay_s=scaling.UPSCALE_DELAY_S,
            upscaling_factor=scaling.UPSCALING_FACTOR,
            downscale_delay_s=scaling.DOWNSCALE_DELAY_S,
            downscaling_factor=scaling.DOWNSCALING_FACTOR,
            policy=AutoscalingPolicy(policy_function=scaling.POLICY),
        )
    engines = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=UNBOUNDED,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": num_gpus,
            # Serve's gRPC takes only 4 MiB by default; what callers send is bounded already. Serve
            # reads this when the process starts.
            "runtime_env": {
                "env_vars": {
                    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "-1",  # any length
                    **engine_environment(num_gpus),
                }
            },
        },
        health_check_period_s=10,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=config.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,
        **number,
    )(EngineReplica)
    ingress = serve.deployment(
        name="Ingress",
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=config.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        **place_ingress(node["Resources"] for node in ray.nodes() if node["Alive"]),
    )(Ingress)
    return ingress.bind(config, engines.bind(config))


def place_ingress(nodes: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """The deployment options that decide where the ingress runs.

    Where the head has no CPUs, as in the clusters of `cluster/`, two replicas run on different
    workers, and clients are answered while the head or one of the workers is lost. A replica that
    is replaced stops first, as a third would need a third node. Elsewhere, as on a single machine,
    one replica takes no CPU from the engines.

    Args:
        nodes: resources of each node.
    """
    if any(HEAD in resources and not resources.get("CPU") for resources in nodes):
        return {
            "num_replicas": 2,
            "max_replicas_per_node": 1,
            "max_surge_percent": 0,
            "ray_actor_options": {"num_cpus": 0.1},  # without any, the head could have them too
        }
    return {"num_replicas": 1, "max_surge_percent": 100, "ray_actor_options": {"num_cpus": 0}}
