"""Where engines run, on GPUs or on CPUs: one rule for captioning jobs and for the service."""

import logging

import ray
import ray._private.state

logger = logging.getLogger(__name__)


def gpus_per_engine(gpus_per_replica: float | None) -> float:
    """GPUs that Ray is to reserve for each engine; 0: it runs on CPUs.

    Args:
        gpus_per_replica: as configured; None: one GPU where the cluster has any or can add one, and
            else none.
    """
    if gpus_per_replica is not None:
        return gpus_per_replica
    return 1.0 if num_gpus_now() or _num_gpus_to_come() else 0.0


def engine_environment(num_gpus: float) -> dict[str, str]:
    """Environment variables of an engine's process, for which Ray reserves `num_gpus`.

    A process without GPUs of its own would see all those of its node, and the engine would use one.
    """
    return {"CUDA_VISIBLE_DEVICES": ""} if not num_gpus and num_gpus_now() else {}


def warn_of_missing_gpus(num_gpus: float) -> None:
    """Warn if engines that reserve GPUs would wait, because the cluster has none."""
    if num_gpus and not num_gpus_now():
        logger.warning(
            "gpus_per_replica=%g, but the cluster has no GPU at the moment: the engines wait until"
            " a node with GPUs joins it; set gpus_per_replica=0 to use CPUs",
            num_gpus,
        )


def num_gpus_now() -> float:
    """GPUs of the cluster's present nodes, in use or free."""
    num_gpus: float = ray.cluster_resources().get("GPU", 0.0)
    return num_gpus


def _num_gpus_to_come() -> int:
    """GPUs at most, by the node groups that the cluster's autoscaler has reported to Ray.

    Ray Data and Ray Train ask the same. Autoscalers that report nothing, as `ray up`'s and
    KubeRay's, count as none.
    """
    most = ray._private.state.state.get_max_resources_from_cluster_config()
    return most.get("GPU", 0) if most else 0
