"""The result of a stage: a Hugging Face folder with the log of the training."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from flashvl.data.storage import Location, locate
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.train.recipe import Recipe

LOG = "training_log.json"
"""File in a finished stage's folder that holds its recipe, its totals and a record of each step."""
CONFIG = "config.json"
"""File that is written last: without it, a folder is not a model."""


def write_model(
    output: Location, model: FlashVLForConditionalGeneration, processor: FlashVLProcessor
) -> None:
    """Write all files of the model but `CONFIG` to `output`, and that one last.

    Raises:
        OSError: `output` cannot be written.
    """
    if output.is_local:
        partial = Path(output.path) / "partial"
        save_pretrained(model, processor, partial)
        for path in _config_last(partial):
            path.replace(Path(output.path) / path.name)
        partial.rmdir()
        return
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, processor, Path(folder))
        for path in _config_last(Path(folder)):
            (output / path.name).write(path.read_bytes())


def _config_last(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: path.name == CONFIG)


@contextmanager
def gathered(model: nn.Module, zero_stage: int) -> Iterator[None]:
    """While the block runs, the model has its whole weights, on every rank; all ranks enter it."""
    if zero_stage < 3:
        yield
        return
    import deepspeed

    weights = [weight for weight in model.parameters() if hasattr(weight, "ds_id")]
    with deepspeed.zero.GatheredParameters(weights):
        yield


def save_pretrained(
    model: FlashVLForConditionalGeneration, processor: FlashVLProcessor, folder: Path
) -> None:
    """Write model, processor and their code to `folder`, which is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_log(
    output: Location, recipe: Recipe, totals: dict[str, Any], steps: Iterable[dict[str, Any]]
) -> None:
    """Write `LOG`; a hundred thousand steps are some 40 MB."""
    head = json.dumps({"recipe": recipe.model_dump(mode="json"), "totals": totals}, indent=1)
    lines = ",\n".join(f"  {json.dumps(record)}" for record in steps)
    (output / LOG).write(f'{head[:-2]},\n "steps": [\n{lines}\n ]\n}}\n'.encode())


def read_totals(output: Location) -> dict[str, Any]:
    """The totals of the finished stage in `output`."""
    return dict(json.loads((output / LOG).read())["totals"])


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The records of the steps of the finished stage that wrote `folder`."""
    return list(json.loads((locate(folder) / LOG).read())["steps"])
