"""The engines' metrics for Prometheus, exported by Ray on each node.

Ray puts `ray_` before the names, and adds the tags `deployment`, `replica` and `application`.
"""

import functools

from ray.serve.metrics import Counter, Gauge, Histogram

from flashvl.engine import Completion, EngineStats

SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]
"""Boundaries of the histograms of waits."""
STEP_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
"""Boundaries of the histogram of times between tokens."""


@functools.cache
def refusals() -> Counter:
    """The counter, one a process, of requests that were not answered, by the error's code."""
    return Counter(
        "flashvl_request_refused_total",
        description="Requests that were not answered, by reason.",
        tag_keys=("reason",),
    )


class EngineMetrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        self.ttft = Histogram(
            "flashvl_time_to_first_token_seconds",
            description="Time from when the engine receives a request to its first token.",
            boundaries=SECONDS,
        )
        self.tpot = Histogram(
            "flashvl_time_per_output_token_seconds",
            description="Mean time between two tokens of an answer.",
            boundaries=STEP_SECONDS,
        )
        self.queue_time = Histogram(
            "flashvl_request_queue_time_seconds",
            description="Time from when the engine receives a request to when it gets a slot.",
            boundaries=SECONDS,
        )
        self.prompt_tokens = Counter(
            "flashvl_prompt_tokens_total", description="Tokens of the prompts that were answered."
        )
        self.generation_tokens = Counter(
            "flashvl_generation_tokens_total", description="Tokens of all answers."
        )
        self.answers = Counter(
            "flashvl_request_success_total",
            description="Answers, by the reason of their end.",
            tag_keys=("finished_reason",),
        )
        self.running = Gauge(
            "flashvl_num_requests_running", description="Requests that hold a slot."
        )
        self.waiting = Gauge(
            "flashvl_num_requests_waiting", description="Requests that wait for a slot."
        )
        self.occupancy = Gauge(
            "flashvl_batch_occupancy_ratio",
            description="Share of the slots in use, the mean since the last report.",
        )
        self.prefilled_tokens = Counter(
            "flashvl_prefilled_tokens_total",
            description="Prompt tokens that the model had to read; shared prompts count once.",
        )
        self.image_hits = Counter(
            "flashvl_image_cache_hits_total",
            description="Images whose features were kept from an earlier request.",
        )
        self.image_misses = Counter(
            "flashvl_image_cache_misses_total", description="Images that the model had to encode."
        )
        self._reported = (0, 0, 0, 0, 0)

    def count(self, completion: Completion) -> None:
        """Count one answer."""
        timing, num_tokens = completion.timing, len(completion.token_ids)
        self.ttft.observe(timing.first_token_s)
        self.queue_time.observe(timing.queue_s)
        if num_tokens > 1:
            self.tpot.observe((timing.last_token_s - timing.first_token_s) / (num_tokens - 1))
        self.prompt_tokens.inc(completion.prompt_tokens)
        if num_tokens:
            self.generation_tokens.inc(num_tokens)
        self.answers.inc(tags={"finished_reason": completion.finish_reason})

    def report(self, stats: EngineStats, max_num_seqs: int) -> None:
        """Set the gauges, and count what the engine has done since the last report."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        now = (
            stats.num_decode_steps,
            stats.num_decoded_tokens,
            stats.num_prefilled_tokens,
            stats.num_image_hits,
            stats.num_image_misses,
        )
        steps, tokens, read, hits, misses = (
            a - b for a, b in zip(now, self._reported, strict=True)
        )
        self._reported = now
        self.occupancy.set(tokens / (steps * max_num_seqs) if steps else 0.0)
        for counter, new in (
            (self.prefilled_tokens, read),
            (self.image_hits, hits),
            (self.image_misses, misses),
        ):
            if new:
                counter.inc(new)
