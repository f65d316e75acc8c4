"""What the handlers of all kinds of request share: the model, and the log of its answers."""

import logging
from dataclasses import dataclass

from flashvl.engine import Completion
from flashvl.serve.dispatch import Engines
from flashvl.serve.prompts import Prompts

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The model that a service offers, and what reaches it."""

    name: str
    """What clients call the model."""
    prompts: Prompts
    engines: Engines


def log_answers(completions: list[Completion]) -> None:
    """Log what a request cost, and nothing of its text; Serve adds the request's id."""
    first = completions[0]
    logger.info(
        "answered prompt_tokens=%d completion_tokens=%d finish_reasons=%s"
        " queue_ms=%.1f ttft_ms=%.1f",
        first.prompt_tokens,
        sum(len(each.token_ids) for each in completions),
        ",".join(each.finish_reason for each in completions),
        1e3 * first.timing.queue_s,
        1e3 * first.timing.first_token_s,
    )
