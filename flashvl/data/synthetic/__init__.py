"""The procedural world: drawn scenes with questions whose exact answers are known.

Everything follows from a seed. A hash of its content puts a scene in the `train` or the `heldout`
split, so the two never share a scene, whatever the seeds. Problems about digits and bars are split
by their numbers alone.

This is flashvl's built-in data set: the shipped models are trained on it, and tests and demos use
it.
"""

from flashvl.data.synthetic.pairs import Pair, pair, preference
from flashvl.data.synthetic.problems import REASONING_TASKS
from flashvl.data.synthetic.samples import (
    CELL_SIDE,
    HELDOUT_SHARE,
    LARGE_SIDE,
    Sample,
    Split,
    conversation,
    encode_jpeg,
    is_cut,
    problem,
    sample,
    samples,
    split_of,
    work_out,
)
from flashvl.data.synthetic.scenes import (
    CELL_CLASSES,
    COLORS,
    GRID,
    SHAPES,
    TASKS,
    UNKNOWN,
    ChartScene,
    PhotoScene,
    RectangleScene,
    Scene,
    Shape,
    ShapesScene,
    Task,
    TextScene,
    Turn,
    cell_labels,
)

__all__ = [
    "CELL_CLASSES",
    "CELL_SIDE",
    "COLORS",
    "GRID",
    "HELDOUT_SHARE",
    "LARGE_SIDE",
    "REASONING_TASKS",
    "SHAPES",
    "TASKS",
    "UNKNOWN",
    "ChartScene",
    "Pair",
    "PhotoScene",
    "RectangleScene",
    "Sample",
    "Scene",
    "Shape",
    "ShapesScene",
    "Split",
    "Task",
    "TextScene",
    "Turn",
    "cell_labels",
    "conversation",
    "encode_jpeg",
    "is_cut",
    "pair",
    "preference",
    "problem",
    "sample",
    "samples",
    "split_of",
    "work_out",
]
