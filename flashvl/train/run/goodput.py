"""The share of a run's time that brings a stage forward, for Prometheus."""

import time

from flashvl.data.gauges import LastingGauge


class Goodput:
    """Measures the goodput of a run: the time in the training loop, less that of steps that were
    lost with a worker and made again, as a share of the time since the run began."""

    def __init__(self, stage: str, seconds: float):
        """
        Args:
            seconds: time in the training loop of the runs before this one.
        """
        self._stage, self._seconds_before = stage, seconds
        self._began_s = time.monotonic()
        self._gauge = LastingGauge(
            "flashvl_train_goodput_ratio",
            description="Share of the run's time in which steps were made that were not lost.",
            tag_keys=("stage",),
        )

    def show(self, seconds: float) -> None:
        """Show the goodput.

        Args:
            seconds: time in the training loop, with that of the runs before.
        """
        passed_s = time.monotonic() - self._began_s
        useful_s = max(seconds - self._seconds_before, 0.0)
        self._gauge.set(min(useful_s / max(passed_s, 1e-6), 1.0), {"stage": self._stage})
