"""A page of the last groups: each prompt with its picture, its completions and their rewards."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import jinja2
import numpy as np
from PIL import Image

from flashvl.data.images import make_thumbnail
from flashvl.data.schema import IMAGE_MARKER
from flashvl.data.storage import Location
from flashvl.train.feed.shares import Tiles
from flashvl.train.grpo.advantages import Float64s, has_signal
from flashvl.train.grpo.groups import Prompt, Rollout

PAGE = "rollouts.html"
NUM_GROUPS = 20
"""Newest groups on the page, at most one of each step."""
STEPS_A_WRITE = 5
MAX_TILES = 12
"""Tiles of a prompt that are shown, its first ones."""
TILE_SIDE = 160
"""Longest side of a tile on the page, in pixels."""
MAX_CHARACTERS = 1500
"""Characters of a text on the page, its last ones, which hold a completion's answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRollout:
    """A completion as the page shows it."""

    text: str
    num_tokens: int
    is_cut: bool
    parts: Sequence[float | None]
    """What each reward function gave; None: nothing."""
    total: float | None
    advantage: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownGroup:
    """A group as the page shows it."""

    step: int
    id: str
    question: str
    answer: str
    tiles: Sequence[str]
    """Shrunk tiles as data URIs."""
    num_tiles: int
    rollouts: Sequence[ShownRollout]
    """The best first."""
    has_signal: bool


@dataclass(kw_only=True, slots=True)
class Gallery:
    """The last groups of one worker."""

    stage: str
    reward_names: Sequence[str]
    groups: deque[ShownGroup] = field(default_factory=lambda: deque(maxlen=NUM_GROUPS))
    """The newest last."""

    def add(
        self,
        step: int,
        prompts: Sequence[Prompt],
        rollouts: Sequence[Sequence[Rollout]],
        parts: Sequence[Float64s],
        totals: Sequence[Float64s],
        advantages: Sequence[Float64s],
    ) -> None:
        """Keep one group of a step: the first with signal, or else the first.

        Args:
            step: number of the step, from 1.
            rollouts, parts, totals, advantages: those of each prompt.
        """
        if not prompts:
            return
        signals = [has_signal(each) for each in totals]
        chosen = signals.index(True) if True in signals else 0
        shown = [
            ShownRollout(
                text=_shorten(rollout.text),
                num_tokens=len(rollout.token_ids),
                is_cut=rollout.is_cut,
                parts=[_number(value) for value in row],
                total=_number(total),
                advantage=float(advantage),
            )
            for rollout, row, total, advantage in zip(
                rollouts[chosen], parts[chosen], totals[chosen], advantages[chosen], strict=True
            )
        ]
        prompt = prompts[chosen]
        self.groups.append(
            ShownGroup(
                step=step,
                id=prompt.id,
                question=_shorten(
                    "\n".join(each["content"] for each in prompt.messages)
                    .replace(IMAGE_MARKER, "")
                    .strip()
                ),
                answer=_shorten(str(prompt.columns.get("answer", ""))),
                tiles=_draw(prompt.tiles),
                num_tiles=len(prompt.tiles),
                rollouts=sorted(shown, key=lambda each: -each.advantage),
                has_signal=signals[chosen],
            )
        )

    def write(self, output: Location) -> None:
        """Write the page to `output`.

        Raises:
            OSError: it cannot be written.
        """
        (output / PAGE).write(self.render().encode())

    def render(self) -> str:
        """The page, which needs no other file."""
        text = (resources.files("flashvl.train.grpo") / "rollouts.html.jinja").read_text("utf-8")
        template = jinja2.Template(
            text,
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        return template.render(
            stage=self.stage, reward_names=self.reward_names, groups=list(reversed(self.groups))
        )


def _draw(tiles: Tiles) -> list[str]:
    pictures = (Image.fromarray(np.moveaxis(tile, 0, -1)) for tile in tiles[:MAX_TILES])
    return [make_thumbnail(picture, TILE_SIDE) for picture in pictures]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else "[...] " + text[-MAX_CHARACTERS:]
