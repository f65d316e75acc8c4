"""Generation with a Flash-VL model: one engine answers many requests at once."""

from flashvl.engine.async_engine import AsyncEngine, EngineStats
from flashvl.engine.engine import Engine
from flashvl.engine.request import (
    Completion,
    Delta,
    Request,
    StructuredOutputs,
    Timing,
    TokenLogprobs,
)
from flashvl.engine.tokens import token_bytes

__all__ = [
    "AsyncEngine",
    "Completion",
    "Delta",
    "Engine",
    "EngineStats",
    "Request",
    "StructuredOutputs",
    "Timing",
    "TokenLogprobs",
    "token_bytes",
]
