"""The cores of a node, which the engines on it share: one rule for jobs and for the service."""

import os
from collections.abc import Sequence

import ray
import torch

from flashvl.config import Replicas, pool_of


def share_cores(replicas: Replicas, gpus_per_replica: float | None) -> None:
    """Let torch use this engine's share of its node's cores; the engine's process calls this.

    Ray would limit the process to as many threads as it reserved CPUs, which is one. The nodes are
    those of this moment: when a job or a service begins, its cluster may have none for engines.

    Args:
        replicas: engines of the job or service, as configured.
        gpus_per_replica: GPUs of each engine; None or 0: it runs on CPUs.
    """
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    own = nodes[ray.get_runtime_context().get_node_id()]
    resource, each = ("GPU", gpus_per_replica) if gpus_per_replica else ("CPU", 1.0)
    own_room, *room = (int(node.get(resource, 0) / each) for node in (own, *nodes.values()))
    _, most = pool_of(replicas)
    cores = min(len(os.sched_getaffinity(0)), int(own.get("CPU", 1)))
    torch.set_num_threads(max(1, cores // engines_on_node(own_room, room, most)))


def engines_on_node(own_room: int, room: Sequence[int], most: int) -> int:
    """Engines on a node when `most` are spread evenly over all nodes with room for one, and at most
    as many as there is room for.

    Args:
        own_room: engines that the node has room for.
        room: engines that each node of the cluster has room for.
    """
    level = 1
    while sum(min(each, level) for each in room) < min(most, sum(room)):
        level += 1
    return max(1, min(own_room, level))
