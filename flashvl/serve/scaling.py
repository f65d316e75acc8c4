"""How the number of engines follows the load: a policy of Serve's autoscaler, and its settings.

An engine shares its time among its requests, so that one more replica takes away more than its part
of them: those that remain end sooner. Where the autoscaler follows that at once, it removes too
many replicas, requests pile up, and it adds too many. Serve's own policy also removes a replica as
soon as one is spare, and misses it soon after, all day long at a steady load. These settings let
the number go part of the way at a time, and leave some replicas to spare; `tests/plan/test_day.py`
replays days of traffic with them.
"""

from typing import Any

from ray.serve.config import AutoscalingContext

TARGET_SHARE = 0.5
"""Share of an engine's slots that the autoscaler tries to keep in use. An engine with half of its
slots in use answers about four fifths of what it can; at more, few further requests fill it."""
LOOK_BACK_PERIOD_S = 120.0
"""Seconds over which the number of requests is averaged, so that chance does not start replicas."""
UPSCALE_DELAY_S = 30.0
"""Seconds for which more replicas must be wanted before some are added."""
UPSCALING_FACTOR = 0.5
"""Share of the missing replicas that is added at a time; one at the least."""
DOWNSCALE_DELAY_S = 3600.0
"""Seconds for which fewer replicas must be wanted before some are removed: the number of replicas
can then not swing within an hour."""
DOWNSCALING_FACTOR = 0.5
"""Share of the spare replicas that is removed at a time; one at the least."""
KEPT = 2.0
"""Replicas that are kept when some are removed, as a multiple of those that the load wants: none is
removed while more than a quarter of the slots is in use."""
POLICY = "flashvl.serve.scaling:follow_load"
"""Name of the policy in the files of Serve."""


def follow_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """The number of replicas that the requests want; Serve applies delays, factors and bounds.

    Between this number and `KEPT` times it, the number stays as it is.

    Returns:
        The number, and what the next call is to be given, which is nothing.
    """
    number = context.target_num_replicas
    wanted = wanted_replicas(
        context.total_num_requests / context.config.get_target_ongoing_requests(), number
    )
    return wanted, {}


def wanted_replicas(enough: float, number: int) -> float:
    """The replicas to aim at, where `enough` would do and there are `number`."""
    return enough if enough >= number else min(enough * KEPT, number)
