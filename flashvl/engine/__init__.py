"""Generation with a Flash-VL model."""

from flashvl.engine.async_engine import AsyncEngine
from flashvl.engine.engine import Engine
from flashvl.engine.request import Completion, Delta, Request, Timing, TokenLogprobs

__all__ = ["AsyncEngine", "Completion", "Delta", "Engine", "Request", "Timing", "TokenLogprobs"]
