"""The checkpoint folder that a stage writes: a Hugging Face folder with the log of the training."""

import json
import shutil
from pathlib import Path
from typing import Any

from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.train.recipe import Recipe

LOG = "training_log.json"
"""File in a checkpoint folder that holds the stage's recipe and a record of each step."""


def save_checkpoint(
    model: FlashVLForConditionalGeneration,
    processor: FlashVLProcessor,
    recipe: Recipe,
    log: list[dict[str, float]],
) -> None:
    """Write `recipe.output_dir`, `config.json` last, without which a folder is not a checkpoint."""
    partial = recipe.output_dir / "partial"
    save_pretrained(model, processor, partial)
    record: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "steps": log}
    (partial / LOG).write_text(json.dumps(record, indent=1) + "\n")
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(recipe.output_dir / path.name)
    partial.rmdir()


def save_pretrained(
    model: FlashVLForConditionalGeneration, processor: FlashVLProcessor, folder: Path
) -> None:
    """Write model, processor and their code to `folder`, which is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """The records of the steps of the stage that wrote `folder`."""
    return json.loads((Path(folder) / LOG).read_text())["steps"]
