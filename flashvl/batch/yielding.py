"""The cores of a machine that offline work shares with an online service."""

import os
from contextlib import suppress


def yield_cores() -> None:
    """Let this process run only on cores that nothing else wants; it cannot be undone.

    Ray's workers have the same niceness, online and offline ones, and a higher one would still take
    a share of the cores and keep others waiting for the kernel's next tick. Linux has `SCHED_IDLE`
    for this, which takes no privilege, and which threads that start later inherit.
    """
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
