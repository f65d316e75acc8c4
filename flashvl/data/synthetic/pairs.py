"""Pairs: a faithful caption, and one that differs from it in one thing."""

import random
from dataclasses import dataclass, replace
from typing import Any, Literal

from flashvl.config import DEFAULT_PROMPT
from flashvl.data.schema import IMAGE_MARKER
from flashvl.data.synthetic.samples import Sample, Split, encode_jpeg, split_of
from flashvl.data.synthetic.scenes import (
    COLORS,
    MAX_LISTED,
    SHAPES,
    SIZES,
    Shape,
    ShapesScene,
    Turn,
    shapes_scene,
)

Change = Literal["attribute", "added", "left out"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A sample with the right caption, and a wrong one."""

    sample: Sample
    change: Change
    """What is wrong: an attribute of a shape is another, or a shape is added or left out."""
    rejected: str
    """The wrong caption."""


def pair(split: Split, seed: int, index: int) -> Pair:
    """Pair `index` of the endless series that `seed` gives for `split`.

    Its scene has up to `MAX_LISTED` shapes, all of which a caption lists.
    """
    rng = random.Random(f"pair/{split}/{seed}/{index}")
    while True:
        scene = shapes_scene(rng.randint(1, MAX_LISTED), rng)
        if split_of(scene) == split:
            break
    change = rng.choice(_possible_changes(scene))
    turn = Turn("caption", DEFAULT_PROMPT, scene.caption())
    drawn = Sample(scene, (turn,), rng.getrandbits(32), rng.randrange(96, 161, 8))
    return Pair(drawn, change, _alter(scene, change, rng).caption())


def preference(drawn: Pair, row: int) -> dict[str, Any]:
    """The pair as a row of `schema.PREFERENCES`."""
    (turn,) = drawn.sample.turns
    quality = random.Random(drawn.sample.style_seed).randint(75, 95)
    return {
        "row": row,
        "images": [encode_jpeg(drawn.sample.image(), quality)],
        "prompt": [{"role": "user", "content": f"{IMAGE_MARKER}\n{turn.question}"}],
        "chosen": [{"role": "assistant", "content": turn.answer}],
        "rejected": [{"role": "assistant", "content": drawn.rejected}],
    }


def _possible_changes(scene: ShapesScene) -> list[Change]:
    changes: list[Change] = ["attribute"]
    if len(scene.shapes) < MAX_LISTED:
        changes.append("added")
    if len(scene.shapes) > 1:
        changes.append("left out")
    return changes


def _alter(scene: ShapesScene, change: Change, rng: random.Random) -> ShapesScene:
    """The scene that a caption with this `change` describes."""
    shapes = list(scene.shapes)
    place = rng.randrange(len(shapes))
    if change == "left out":
        del shapes[place]
    elif change == "added":
        cell, _ = shapes[place]  # only the order of the shapes is in a caption
        shape = Shape(rng.choice(list(SIZES)), rng.choice(list(COLORS)), rng.choice(SHAPES))
        shapes.insert(place + rng.randint(0, 1), (cell, shape))
    else:
        cell, shape = shapes[place]
        name, values = rng.choice((("size", SIZES), ("color", COLORS), ("shape", SHAPES)))
        others = [value for value in values if value != getattr(shape, name)]
        shapes[place] = cell, replace(shape, **{name: rng.choice(others)})
    return ShapesScene(tuple(shapes))
