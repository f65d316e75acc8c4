"""Clusters of a test's own, and the ports and processes of this machine that they take."""

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
from ray.cluster_utils import Cluster


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on; no two are alike, as all are held at once."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def head_of_its_own(num_cpus: int) -> dict[str, Any]:
    """Options of a head node with free ports for everything that Ray starts once on a machine."""
    names = ("dashboard_port", "dashboard_agent_listen_port", "metrics_export_port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    return {"num_cpus": num_cpus, "include_dashboard": True} | ports


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes that a raylet dies with; a cluster ends with its head's raylet."""


def workers(cluster: Cluster, title: str) -> list[psutil.Process]:
    """The processes of the cluster's nodes whose titles begin with `title`, without `AGENTS`."""
    found = []
    for node in cluster.list_all_nodes():
        raylet = node.all_processes["raylet"][0].process
        if raylet.poll() is None:
            for process in psutil.Process(raylet.pid).children(recursive=True):
                try:
                    line = " ".join(process.cmdline())
                    if line.startswith(title) and not line.startswith(AGENTS):
                        found.append(process)
                except psutil.Error:
                    continue  # it ended meanwhile
    return found


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    """Fail where `is_so` has not become true within `seconds`."""
    deadline_s = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
