"""How many engines a node is to hold, on whose share of its cores each engine then runs."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashvl.batch import cores
from flashvl.batch.cores import engines_on_node, share_cores

HEAD = {"node:__internal_head__": 1.0}
"""A head that runs no work, as in the clusters of `cluster/`."""


@pytest.mark.parametrize(
    ("own_room", "room", "most", "engines"),
    [
        (4, [4], 2, 2),
        (4, [0, 4], 2, 2),  # the head has no CPUs
        (8, [0, 8, 8, 8], 3, 1),
        (8, [8, 8], 3, 2),
        (2, [2, 16], 8, 2),
        (16, [2, 16], 8, 6),
        (4, [4, 4], 100, 4),  # the others wait for room
        (0, [0], 8, 1),
    ],
)
def test_engines_are_spread_evenly_where_there_is_room(
    own_room: int, room: list[int], most: int, engines: int
) -> None:
    assert engines_on_node(own_room, room, most) == engines


def dealt(room: Sequence[int], most: int) -> list[int]:
    """The engines of each node, when they are placed one by one where fewest are."""
    held = [0] * len(room)
    for _ in range(min(most, sum(room))):
        free = [node for node in range(len(room)) if held[node] < room[node]]
        held[min(free, key=held.__getitem__)] += 1
    return held


@pytest.mark.parametrize("room", [[8], [0, 8, 8], [1, 2, 3, 16], [5, 5, 5, 5, 5]])
@pytest.mark.parametrize("most", [1, 2, 7, 20, 60])
def test_as_many_as_one_by_one_on_the_fullest_node(room: list[int], most: int) -> None:
    """Nodes with room differ by one engine; each reckons with the greater number."""
    held = dealt(room, most)
    reckoned = [engines_on_node(each, room, most) for each in room]
    assert max(reckoned) == max(held)
    assert all(0 <= more - fewer <= 1 for more, fewer in zip(reckoned, held, strict=True))


@pytest.mark.parametrize(
    ("nodes", "gpus_per_replica", "threads"),
    [
        ([HEAD, {"CPU": 16.0}], 0.0, 4),
        ([HEAD, {"CPU": 16.0}, {"CPU": 16.0}], None, 8),
        ([HEAD, {"CPU": 6.0}, {"CPU": 6.0}], 0.0, 3),  # a container that may use six
        ([{"CPU": 64.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 2.0}], 1.0, 8),
        ([{"CPU": 64.0}, {"CPU": 16.0, "GPU": 1.0}], 0.5, 8),
    ],
)
def test_threads_of_the_fourth_of_four_engines(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    gpus_per_replica: float | None,
    threads: int,
) -> None:
    """On the last of these nodes, a machine of 16 cores."""
    told: list[dict[str, Any]] = [
        {"NodeID": str(number), "Alive": True, "Resources": node}
        for number, node in enumerate(nodes)
    ]
    lost = {"NodeID": "lost", "Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    context = SimpleNamespace(get_node_id=lambda: str(len(nodes) - 1))
    monkeypatch.setattr(cores.ray, "nodes", lambda: [*told, lost])
    monkeypatch.setattr(cores.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(16)))
    before = torch.get_num_threads()
    try:
        share_cores("1:4", gpus_per_replica)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
