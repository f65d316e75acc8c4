"""What the kinds of request share: the model behind them, and the log of what it answered."""

import logging
from dataclasses import dataclass

from flashvl.engine import Completion
from flashvl.serve.dispatch import Engines
from flashvl.serve.prompts import Prompts

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The model that the service answers for."""

    name: str
    prompts: Prompts
    engines: Engines


def log_answers(completions: list[Completion]) -> None:
    """What an answer cost, and nothing of what was said; Serve puts the request's id beside it."""
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
