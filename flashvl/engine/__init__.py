"""Generation with a Flash-VL model."""

from flashvl.engine.engine import Engine
from flashvl.engine.request import Completion, Request

__all__ = ["Completion", "Engine", "Request"]
