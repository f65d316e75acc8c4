"""Waiting in a fleet of engines: Erlang's C formula, for servers that slow each other down.

Requests come at random (a Poisson process) and wait in the order in which they came. The number of
requests in the fleet is a birth-death process: it grows at the arrival rate, and falls at the rate
at which the engines answer as many requests as there are, or as they have slots. Where an engine
with n requests answers n times as many as with one, this is Erlang's M/M/c (A. K. Erlang, 1917; D.
Gross et al., Fundamentals of Queueing Theory, 4th edition, sections 2.1 and 2.3). An engine shares
its time among its requests, so that the number of those that hold slots depends on the mean length
of the answers alone, whatever their distribution (processor sharing; F. P. Kelly, Reversibility and
Stochastic Networks, section 3.3).

All engines are taken to have one queue: Serve sends a request to the emptier of two replicas, so
that hardly any waits while others have room (M. Mitzenmacher, The Power of Two Choices in
Randomized Load Balancing, 2001).

A request with a slot waits until the engine reads its prompt. The engine reads the prompts that
have come, then makes a decoding step, and so on: a queue with gated service and vacations, M/D/1
(H. Takagi, Queueing Analysis, volume 1, section 2.3).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flashvl.plan.speed import Speed


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """The queue of a fleet in its steady state."""

    utilization: float
    """Arrival rate as a share of the rate at which full engines answer."""
    waiting_share: float
    """Share of the requests that find no free slot: Erlang's C."""
    drain_per_s: float
    """Rate of the exponential distribution of the waits of those that find none."""
    reading_share: float
    """Share of the requests that come while an engine reads other prompts."""
    reading_s: float
    """Mean seconds, taken to be exponentially distributed, that those wait for the prompts before
    theirs."""
    step_s: float
    """Seconds of a decoding step, which any request may wait for."""

    @property
    def wait_s(self) -> float:
        """Seconds that 99% of the requests do not wait longer until their prompt is read."""
        return sum(self._excesses(), self.step_s)

    def late_share(self, seconds: float) -> float:
        """Share of the requests that wait longer than this, at most."""
        rest_s = max(seconds - self.step_s, 0.0)
        late = self.waiting_share * math.exp(-self.drain_per_s * rest_s)
        if self.reading_s:
            late += self.reading_share * math.exp(-rest_s / self.reading_s)
        return late

    def _excesses(self) -> Iterator[float]:
        """Seconds for a slot and for other prompts that 1% of the requests wait longer."""
        if self.waiting_share > 0.01:
            yield math.log(100 * self.waiting_share) / self.drain_per_s
        if self.reading_share > 0.01:
            yield math.log(100 * self.reading_share) * self.reading_s


def solve_queue(arrivals_per_s: float, speed: Speed, replicas: int) -> Queue | None:
    """The queue of a fleet; None where it would grow without end.

    Args:
        arrivals_per_s: requests a second, of which there are some.
    """
    full = replicas * speed.requests_per_s
    prefill_s = speed.prefill_s or 0.0
    busy = arrivals_per_s / replicas * prefill_s
    if arrivals_per_s >= full or busy >= 1:
        return None
    # Probabilities as shares of that of the empty fleet, as logarithms: they may be huge.
    rates = speed.fleet_rates(replicas)
    logs = np.concatenate([[0.0], np.cumsum(np.log(arrivals_per_s / rates))])
    weights = np.exp(logs - logs.max())
    utilization = arrivals_per_s / full
    waiting = weights[-1] / (1 - utilization)  # all slots in use, with any number that wait
    return Queue(
        utilization=utilization,
        waiting_share=float(waiting / (weights[:-1].sum() + waiting)),
        drain_per_s=full - arrivals_per_s,
        reading_share=busy,
        reading_s=(prefill_s / 2 + speed.step_s) / (1 - busy) if busy else 0.0,
        step_s=speed.step_s,
    )
