"""Trains a shipped checkpoint again, by the project's own recipes, on two CPU cores.

    make tiny
    make tiny-iss
    python ray_jobs/tiny.py tiny-dynamic --runs runs/tiny-dynamic --output /tmp/tiny-dynamic

tiny: random weights -> pre-training of the tower and of the LLM -> stages 1 to 4. The tiled models
begin with the tower and the LLM of the shipped tiny, like the paper's with published ones. Each
stage starts from the checkpoint of the one before, and its model is asked the held-out questions.
At the end the weights are written in bf16, with a model card. A run that was interrupted resumes
where it stopped; remove RUNS to begin anew.
"""

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from flashvl.entrypoint import report_errors, show_progress, start_ray

PIPELINES = Path(__file__).parent / "configs" / "pipelines"
MAX_BYTES = 12_000_000
"""Size of a shipped model's weights at most, as the package holds them."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(TEXTS)
    parser.add_argument("preset", nargs="?", choices=names, default="tiny")
    parser.add_argument("--runs", type=Path, help="folder for the checkpoints (runs/PRESET)")
    parser.add_argument("--output", type=Path, help="folder for the result (inside the package)")
    arguments = parser.parse_args()
    preset: str = arguments.preset
    with report_errors():
        start_ray(include_dashboard=True)
        make_checkpoint(
            preset,
            arguments.runs or Path("runs") / preset,
            arguments.output or Path("flashvl/checkpoints") / preset,
        )


def make_checkpoint(preset: str, runs: Path, output: Path) -> None:
    """Train in the folder `runs`, and write the finished checkpoint and its card to `output`."""
    from flashvl.engine import Engine
    from flashvl.eval.pipeline import run_and_score
    from flashvl.eval.scenes import average, evaluate_scenes
    from flashvl.train.pipeline import load_pipeline

    pipeline = load_pipeline(PIPELINES / f"{preset}.yaml", [f"output_dir={runs}"])
    records = run_and_score(
        pipeline, show_progress, lambda record: print(json.dumps(record), flush=True)
    )
    export(runs / records[-1]["stage"], output)
    scores = evaluate_scenes(Engine.from_pretrained(output))
    last = {task: score.exact_match for task, score in scores.items()}
    (output / "README.md").write_text(write_card(preset, records, last))
    print(f"{output}: average exact match {average(scores):.3f}")


def export(checkpoint: Path, output: Path) -> None:
    """Copy a stage's checkpoint in the form that the package ships: bf16 weights without code.

    A copy of the package's code beside the weights would become outdated.
    """
    import torch

    from flashvl.model.loading import load_model, load_processor

    shutil.rmtree(output, ignore_errors=True)
    load_model(checkpoint, torch.bfloat16).save_pretrained(output)
    load_processor(checkpoint).save_pretrained(output)
    for code in output.glob("*.py"):
        code.unlink()
    for name in ("config.json", "processor_config.json"):
        path = output / name
        path.write_text(
            json.dumps(_without_auto_map(json.loads(path.read_text())), indent=2) + "\n"
        )
    weights = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert weights <= MAX_BYTES, f"weights of {weights} bytes exceed {MAX_BYTES}; shrink the preset"


def _without_auto_map(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_auto_map(item) for key, item in value.items() if key != "auto_map"}


def write_card(preset: str, records: list[dict[str, Any]], last: dict[Any, float]) -> str:
    """The model card: what the model is, how it was made, and its scores after each stage."""
    from flashvl.train.pipeline import render_scores

    shipped = {"stage": "shipped (bf16)", "rows": None, "loss": None, "seconds": None}
    minutes = round(sum(record["seconds"] for record in records) / 60)
    return CARD.format(
        preset=preset,
        table=render_scores([*records, shipped | {"scores": last}]).rstrip(),
        made=f"`make {preset}` made it in {minutes} minutes on {platform.machine()},"
        f" {os.cpu_count()} cores, no GPU",
        **TEXTS[preset],
    )


TEXTS = {
    "tiny": {
        "shape": "SigLIP tower (96 px, patch 12), pixel shuffle\n2x2, the five-layer adapter, a"
        " Qwen2 LLM: the static variant, 16 visual tokens an image",
        "start": "random weights; a pre-training\nof the tower (what lies in each cell) and of the"
        " LLM (the scenes in words), which stand in for the\npublished SigLIP2 and Qwen2.5"
        " weights; then the paper's stages 1 to 4",
    },
    "tiny-dynamic": {
        "shape": "`tiny` with dynamic tiling, an\noverview and up to four tiles of 16 visual tokens"
        " each",
        "start": "all weights of the shipped `tiny`;\nthen its adapter alone, then the whole model",
    },
    "tiny-iss": {
        "shape": "`tiny` with Implicit Semantic\nStitching, an overview and up to four tiles of 16"
        " visual tokens each, no pixel shuffle",
        "start": "tower and LLM of the shipped `tiny`\nand a new adapter; then the adapter alone,"
        " then the whole model",
    },
}
"""Sentences of the cards that differ between the models."""

CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# {preset}

A real Flash-VL, small enough to ship: {shape}.
It knows the procedural world of `flashvl.data.synthetic` and nothing else: coloured shapes, signs,
sums and bar charts, in English. About any other picture it says that it is not a drawing that it
knows, or it gives a wrong answer.

## How it was made

{made}: {start}, by `ray_jobs/configs/{preset}/`.
Every training scene is drawn anew and seen once.

## What it scores

Exact match on held-out scenes, 120 questions a task, after each stage as in the paper's Table 5
(`flashvl eval scenes --model {preset}`). No held-out scene is a training scene; the words and sums
on signs and boards may recur, at other places and in other colours.

{table}
"""


if __name__ == "__main__":
    main()
