"""A conversation about pictures, turn by turn."""

from collections.abc import Iterator, Sequence

from PIL import Image

from flashvl.data.features import make_tiles
from flashvl.data.schema import IMAGE_MARKER
from flashvl.engine.engine import Engine
from flashvl.engine.request import Request


class ChatSession:
    """Asks an engine about `images`, which come before the first question."""

    def __init__(self, engine: Engine, images: Sequence[Image.Image], max_new_tokens: int = 256):
        self.engine = engine
        # Cut once here, and encoded once by the engine, which knows them again by their content.
        self.tiles = make_tiles(images, engine.processor)
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; the turn joins the conversation when all pieces were taken.

        Raises:
            DataError: the conversation has become too long, or `question` holds an `<image>`.
        """
        markers = "" if self.messages else f"{IMAGE_MARKER}\n" * len(self.tiles.counts)
        turn = {"role": "user", "content": markers + question}
        request = Request(
            messages=[*self.messages, turn],
            images=self.tiles,
            max_new_tokens=self.max_new_tokens,
        )
        answer = ""
        for delta in self.engine.stream(request):
            answer += delta.text
            yield delta.text
        self.messages += [turn, {"role": "assistant", "content": answer}]
