"""What a stage leaves: a Hugging Face folder with the log of its training."""

import json
import shutil
from pathlib import Path
from typing import Any

from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.train.recipe import Recipe

LOG = "training_log.json"
"""The recipe and a record a step."""


def save_checkpoint(
    model: FlashVLForConditionalGeneration,
    processor: FlashVLProcessor,
    recipe: Recipe,
    log: list[dict[str, float]],
) -> None:
    """Write `recipe.output_dir`; its `config.json` comes last, so a half-written folder is none."""
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
    """Model, processor and their code in `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """The records that the stage which wrote `folder` left, one a step."""
    return json.loads((Path(folder) / LOG).read_text())["steps"]
