"""What the workers are doing, gathered in an actor: for the progress, the watchdog and SIGTERM.

Workers tell it where they are and wait for nothing; the driver asks it once a second.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

INTERVAL_S = 1.0
"""Seconds between two questions of the driver."""

Phase = Literal["start", "data", "compute", "update", "checkpoint", "evaluation", "export"]
"""What a worker does: loads the model, waits for its share of a step, computes the loss and its
gradients, updates the weights; or one of the things that happen between steps."""
PHASES: tuple[Phase, ...] = (
    "start",
    "data",
    "compute",
    "update",
    "checkpoint",
    "evaluation",
    "export",
)
"""The phases in the order in which a worker passes through them."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The last that a worker told."""

    rank: int
    step: int
    phase: Phase
    age_s: float
    """Seconds since."""

    def __str__(self) -> str:
        return f"rank {self.rank} (step {self.step}, {self.phase}, for {self.age_s:.0f} s)"


@dataclass(frozen=True, slots=True)
class Report:
    """The state of all workers."""

    beats: list[Beat]
    record: dict[str, Any] | None
    """Record of the last step; None: no step is finished."""

    @property
    def silent_s(self) -> float:
        """Seconds since any worker told anything; 0 before the first."""
        return min((beat.age_s for beat in self.beats), default=0.0)

    def laggard(self) -> Beat:
        """The worker that the others wait for: the one that has got least far."""
        return min(self.beats, key=lambda beat: (beat.step, PHASES.index(beat.phase), -beat.age_s))


class _Monitor:
    def __init__(self) -> None:
        self._beats: dict[int, tuple[int, Phase, float]] = {}
        self._workers: dict[int, ActorHandle] = {}
        self._record: dict[str, Any] | None = None
        self._is_stop_asked = False

    def join(self, rank: int, worker: ActorHandle) -> None:
        self._workers[rank] = worker

    def beat(self, rank: int, step: int, phase: Phase, record: dict[str, Any] | None) -> None:
        self._beats[rank] = (step, phase, time.monotonic())
        self._record = record or self._record

    def read(self) -> Report:
        now_s = time.monotonic()
        beats = [
            Beat(rank, step, phase, now_s - since_s)
            for rank, (step, phase, since_s) in sorted(self._beats.items())
        ]
        return Report(beats, self._record)

    def workers(self) -> list[ActorHandle]:
        return list(self._workers.values())

    def ask_to_stop(self) -> None:
        self._is_stop_asked = True

    def is_stop_asked(self) -> bool:
        return self._is_stop_asked


def start_monitor() -> ActorHandle:
    """A monitor for the workers of one attempt; it ends with its last handle."""
    return ray.remote(num_cpus=0)(_Monitor).remote()


class Pulse:
    """A worker's side of the monitor."""

    def __init__(self, monitor: ActorHandle, rank: int):
        self._monitor, self._rank = monitor, rank
        self._answer: ray.ObjectRef | None = None
        worker = ray.get_runtime_context().current_actor
        monitor.join.options(num_returns=0).remote(rank, worker)

    def beat(self, step: int, phase: Phase, record: dict[str, Any] | None = None) -> None:
        """Tell where this worker is.

        Args:
            step: number of the step that it makes, from 1.
            record: record of a step that is finished, by rank 0.
        """
        self._monitor.beat.options(num_returns=0).remote(self._rank, step, phase, record)

    def ask_whether_to_stop(self) -> None:
        """Ask without waiting for the answer."""
        if self._answer is None:
            self._answer = self._monitor.is_stop_asked.remote()

    def must_stop(self) -> bool:
        """The answer to the last question, if there is one yet.

        Raises:
            RayActorError: the monitor's process was lost.
        """
        if self._answer is None:
            return False
        done, _ = ray.wait([self._answer], timeout=0)
        if not done:
            return False
        answer, self._answer = self._answer, None
        return bool(ray.get(answer))


class Watch:
    """The driver's side of the monitor: a thread that shows progress and ends a hung attempt."""

    def __init__(
        self, monitor: ActorHandle, hang_timeout_s: float, show: Callable[[dict[str, Any]], None]
    ):
        """
        Args:
            show: shows the record of the last step.
        """
        self.hang: str | None = None
        """What the workers did when they were stopped as hung; None: they were not."""
        self._monitor, self._hang_timeout_s, self._show = monitor, hang_timeout_s, show
        self._ended = threading.Event()
        self._must_stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Let the workers write a checkpoint and leave; safe to call in a signal's handler."""
        self._must_stop.set()

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        shown: dict[str, Any] | None = None
        while not self._ended.wait(INTERVAL_S):
            try:
                if self._must_stop.is_set():
                    ray.get(self._monitor.ask_to_stop.remote())
                report: Report = ray.get(self._monitor.read.remote())
                if report.record is not None and report.record != shown:
                    shown = report.record
                    self._show(shown)
                if report.silent_s > self._hang_timeout_s:
                    self._stop_as_hung(report)
                    return
            except RayError:
                return  # the monitor's process was lost, which the workers notice, too

    def _stop_as_hung(self, report: Report) -> None:
        others = [beat for beat in report.beats if beat != report.laggard()]
        told = f"; {', '.join(map(str, others[:3]))}" if others else ""
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        self.hang = f"{report.laggard()} lags behind the others{told}{more}"
        for worker in ray.get(self._monitor.workers.remote()):
            ray.kill(worker)
