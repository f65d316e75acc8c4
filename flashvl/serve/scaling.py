"""How the number of engines follows the load: the settings of Serve's autoscaler.

An engine shares its time among its requests, so that one more replica takes away more than its part
of them: those that remain end sooner. Where the autoscaler follows that at once, it removes too
many replicas, requests pile up, and it adds too many. These settings let it go part of the way at a
time; `tests/plan/test_day.py` replays a day of traffic with them.
"""

TARGET_SHARE = 0.5
"""Share of an engine's slots that the autoscaler tries to keep in use. An engine with half of its
slots in use answers about four fifths of what it can; at more, few further requests fill it."""
LOOK_BACK_PERIOD_S = 120.0
"""Seconds over which the number of requests is averaged, so that chance does not start replicas."""
UPSCALE_DELAY_S = 30.0
"""Seconds for which more replicas must be wanted before some are added."""
UPSCALING_FACTOR = 0.5
"""Share of the missing replicas that is added at a time."""
DOWNSCALE_DELAY_S = 3600.0
"""Seconds for which fewer replicas must be wanted before some are removed: the number of replicas
can then not swing within an hour."""
DOWNSCALING_FACTOR = 0.3
"""Share of the spare replicas that is removed at a time; one at the least."""
