"""Answers of an engine in the test's own process, for comparison with a service's or a job's."""

from typing import Any

from flashvl.data.images import decode_image
from flashvl.engine import Completion, Engine, Request


def by_engine(engine: Engine, content: str, *images: bytes, **options: Any) -> Completion:
    """The engine's answer to one turn; `content` has an `<image>` for each image file."""
    request = Request(
        messages=[{"role": "user", "content": content}],
        images=[decode_image(image) for image in images],
        **({"max_new_tokens": 256} | options),
    )
    return engine.generate([request])[0]
