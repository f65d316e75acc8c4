"""A day of a service in minutes: simulated engines and queues, scaled by Ray Serve's own code.

The engines do what `flashvl.engine` does, step by step: they read some prompts, then decode a token
of every answer, and so on. Requests go to the emptier of two replicas, as Serve's router sends
them. What decides on the number of replicas is Serve's `DeploymentAutoscalingState`, with a clock
of the simulation's own.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve._private import autoscaling_state
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    HandleMetricReport,
    ReplicaID,
    TimeStampedValue,
)
from ray.serve.config import AutoscalingConfig

TICK_S = 1.0
"""Seconds between two samples that the handle takes and sends, and between two decisions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What an engine's steps take."""

    slots: int
    prefill_s: float
    """Seconds to read one prompt."""
    step_s: Callable[[int], float]
    """Seconds to decode a token of each of some answers."""
    group: int
    """Prompts that are read in one step at most."""
    mean_tokens: int


@dataclass(kw_only=True, slots=True)
class Replica:
    """One engine, as far as its time has been simulated."""

    work: Work
    number: int
    now_s: float
    steps: int = 0
    ends: list[int] = field(default_factory=list)
    """Numbers of the steps with which the answers under way end, as a heap."""
    waiting: deque[tuple[float, int]] = field(default_factory=deque)
    """Times at which requests came that have no slot yet, and the tokens of their answers."""
    waits_s: list[float] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return len(self.ends) + len(self.waiting)

    def run_until(self, end_s: float) -> None:
        """Let the engine work; its last step may end later than `end_s`."""
        work, ends = self.work, self.ends
        while self.now_s < end_s:
            room = work.slots - len(ends)
            if self.waiting and room:
                self._admit(min(room, work.group, len(self.waiting)))
                self._decode(1)
            elif ends:
                num_steps = ends[0] - self.steps
                if not self.waiting:  # a request may come after end_s
                    step_s = work.step_s(len(ends))
                    num_steps = min(num_steps, math.ceil((end_s - self.now_s) / step_s))
                self._decode(num_steps)
            else:
                self.now_s = end_s

    def _admit(self, count: int) -> None:
        came = [self.waiting.popleft() for _ in range(count)]
        self.waits_s += [self.now_s - came_s for came_s, _ in came]
        self.now_s += count * self.work.prefill_s
        self.ttfts_s += [self.now_s - came_s for came_s, _ in came]
        for _, num_tokens in came:
            heapq.heappush(self.ends, self.steps + num_tokens - 1)

    def _decode(self, num_steps: int) -> None:
        self.now_s += num_steps * self.work.step_s(len(self.ends))
        self.steps += num_steps
        while self.ends and self.ends[0] <= self.steps:
            heapq.heappop(self.ends)


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """What came of the requests of a simulated day, and of the replicas."""

    waits_s: np.ndarray
    """(requests,): seconds until each had a slot."""
    ttfts_s: np.ndarray
    """(requests,): seconds until each had its first token."""
    targets: list[int]
    """The autoscaler's number of replicas at each tick."""
    replica_hours: float
    """Replicas that start, run or finish their requests, times hours."""

    @property
    def turns_s(self) -> list[float]:
        """The times at which the number of replicas changed its direction."""
        turns_s, last = [], 0
        for tick in range(1, len(self.targets)):
            change = self.targets[tick] - self.targets[tick - 1]
            if change and last and (change > 0) != (last > 0):
                turns_s.append(tick * TICK_S)
            last = change or last
        return turns_s


def replay(
    work: Work,
    rates_per_s: Sequence[float],
    scaling: AutoscalingConfig,
    *,
    start_s: float,
    seed: int = 0,
) -> Day:
    """Send Poisson traffic to replicas that Serve's autoscaler starts and stops.

    Args:
        rates_per_s: requests a second in each minute.
        start_s: seconds that a replica takes to get ready.
    """
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(now_s=0.0)
        own_time = SimpleNamespace(time=lambda: clock.now_s, monotonic=lambda: clock.now_s)
        patch.setattr(autoscaling_state, "time", own_time)
        patch.setattr("ray.serve.autoscaling_policy.time", own_time)
        patch.setattr(DeploymentAutoscalingState, "record_autoscaling_metrics", _record_nothing)
        return _replay(work, rates_per_s, scaling, start_s, clock, random.Random(seed))


def _replay(
    work: Work,
    rates_per_s: Sequence[float],
    scaling: AutoscalingConfig,
    start_s: float,
    clock: Any,
    rng: random.Random,
) -> Day:
    deployment = DeploymentID(name="EngineReplica", app_name="flashvl")
    autoscaler = DeploymentAutoscalingState(deployment)
    info = SimpleNamespace(
        deployment_config=SimpleNamespace(autoscaling_config=scaling, gang_scheduling_config=None),
        target_capacity=None,
        target_capacity_direction=None,
        config_changed=lambda _: False,
    )
    target = autoscaler.register(info, scaling.min_replicas)
    numbers = iter(range(10**9))
    running = [Replica(work=work, number=next(numbers), now_s=0.0) for _ in range(target)]
    starting: list[float] = []
    """Times at which replicas get ready."""
    stopping: list[Replica] = []
    stopped: list[Replica] = []
    series: deque[TimeStampedValue] = deque()
    targets: list[int] = []
    replica_s = 0.0
    probability = 1 / work.mean_tokens
    next_s = rng.expovariate(rates_per_s[0])
    for tick in range(round(len(rates_per_s) * 60 / TICK_S)):
        now_s = clock.now_s = (tick + 1) * TICK_S
        rate = rates_per_s[int(tick * TICK_S // 60)]
        while next_s < now_s:
            one, other = rng.choice(running), rng.choice(running)
            one.run_until(next_s)
            other.run_until(next_s)
            chosen = one if one.num_requests <= other.num_requests else other
            length = math.ceil(math.log(1 - rng.random()) / math.log(1 - probability))
            chosen.waiting.append((next_s, max(2, min(length, 4 * work.mean_tokens))))
            next_s += rng.expovariate(rate)
        for replica in (*running, *stopping):
            replica.run_until(now_s)
        while starting and starting[0] <= now_s:
            starting.pop(0)
            running.append(Replica(work=work, number=next(numbers), now_s=now_s))
        stopped += [replica for replica in stopping if not replica.num_requests]
        stopping = [replica for replica in stopping if replica.num_requests]
        replica_s += TICK_S * (len(running) + len(starting) + len(stopping))
        # The handle samples all replicas at one time: their sum is one series.
        total = sum(replica.num_requests for replica in running)
        series.append(TimeStampedValue(now_s, total))
        while series[0].timestamp < now_s - scaling.look_back_period_s:
            series.popleft()
        autoscaler.update_running_replica_ids(
            [ReplicaID(str(replica.number), deployment) for replica in running]
        )
        autoscaler.record_request_metrics_for_handle(
            HandleMetricReport(
                deployment_id=deployment,
                handle_id="handle",
                actor_id="proxy",
                handle_source=DeploymentHandleSource.REPLICA,
                queued_requests=list(series),
                metrics={},
                timestamp=now_s,
            )
        )
        wanted = autoscaler.get_decision_num_replicas(target)
        for _ in range(wanted - target):
            starting.append(now_s + start_s)
        for _ in range(target - wanted):
            if starting:
                starting.pop()
            else:
                stopping.append(running.pop())
        target = wanted
        targets.append(target)
    everyone = [*running, *stopping, *stopped]
    return Day(
        waits_s=np.concatenate([replica.waits_s for replica in everyone]),
        ttfts_s=np.concatenate([replica.ttfts_s for replica in everyone]),
        targets=targets,
        replica_hours=replica_s / 3600,
    )


def _record_nothing(*_: Any) -> None:
    """The metrics of a real autoscaler would need Ray."""
