"""Make the shipped `tiny` checkpoint anew, by the project's own recipes, on two CPU cores.

    make tiny
    python ray_jobs/tiny.py --runs runs/tiny --output /tmp/tiny

Random weights -> tower and LLM pre-training -> stages 1 to 4, each from the checkpoint of the one
before and each asked the held-out questions; then the weights in bf16 with a model card. Run again
after an interruption, it goes on behind the last finished stage; remove RUNS to begin anew.
"""

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from flashvl.entrypoint import report_errors, show_progress, start_ray

RECIPES = Path(__file__).parent / "configs" / "tiny"
PRETRAINING = ("tower", "llm")
STAGES = ("stage1", "stage2", "stage3", "stage4")
MAX_BYTES = 12_000_000
"""Of the weights inside the package."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="for the stages")
    parser.add_argument(
        "--output", type=Path, default=Path("flashvl/checkpoints/tiny"), help="for the result"
    )
    arguments = parser.parse_args()
    with report_errors():
        start_ray(include_dashboard=True)
        make_tiny(arguments.runs, arguments.output)


def make_tiny(runs: Path, output: Path) -> None:
    """Train into `runs`, write the finished checkpoint and its card to `output`."""
    from flashvl.config import load_config
    from flashvl.engine import Engine
    from flashvl.eval.scenes import average, evaluate_scenes
    from flashvl.train.create import create_random
    from flashvl.train.launch import run
    from flashvl.train.recipe import Recipe

    if not (runs / "random" / "config.json").exists():
        create_random("tiny", runs / "random")
    rows: list[dict[str, Any]] = []
    before = "random"
    for stage in (*PRETRAINING, *STAGES):
        record = runs / stage / "result.json"
        if not record.exists():
            start = time.perf_counter()
            paths = [f"init_from={runs / before}", f"output_dir={runs / stage}"]
            recipe = load_config(Recipe, RECIPES / f"{stage}.yaml", paths)
            with show_progress(stage) as on_progress:
                result = run(recipe, on_progress)
            row: dict[str, Any] = {
                "stage": stage,
                "samples": result.num_steps * recipe.global_batch_size,
                "loss": round(result.loss, 4),
            }
            if stage in STAGES:
                scores = evaluate_scenes(Engine.from_pretrained(runs / stage))
                row |= {task: round(score.exact_match, 3) for task, score in scores.items()}
                row["average"] = round(average(scores), 3)
            row["seconds"] = round(time.perf_counter() - start)
            record.write_text(json.dumps(row) + "\n")
        rows.append(json.loads(record.read_text()))
        print(json.dumps(rows[-1]), flush=True)
        before = stage
    export(runs / before, output)
    scores = evaluate_scenes(Engine.from_pretrained(output))
    card = write_card(rows, {task: score.exact_match for task, score in scores.items()})
    (output / "README.md").write_text(card)
    print(f"{output}: average exact match {average(scores):.3f}")


def export(checkpoint: Path, output: Path) -> None:
    """Copy a stage's checkpoint as the package ships it: bf16 weights, no code of its own.

    The package is the code, and a copy of it beside the weights would grow stale.
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


def write_card(rows: list[dict[str, Any]], final: dict[Any, float]) -> str:
    """The model card: what it is, how it was made, what it scores after each stage."""
    tasks = list(final)
    lines = [f"| stage | samples | seconds | loss | {' | '.join(tasks)} | average |"]
    lines.append("|---" * (len(tasks) + 5) + "|")
    for row in rows:
        scores = [f"{row[task]:.3f}" if task in row else "-" for task in (*tasks, "average")]
        cells = [row["stage"], row["samples"], row["seconds"], row["loss"], *scores]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    last = [f"{score:.3f}" for score in (*final.values(), sum(final.values()) / len(final))]
    lines.append("| " + " | ".join(["shipped (bf16)", "-", "-", "-", *last]) + " |")
    table = "\n".join(lines)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    minutes = round(sum(row["seconds"] for row in rows) / 60)
    return CARD.format(table=table, minutes=minutes, machine=machine)


CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# tiny

A real Flash-VL, static variant, small enough to ship: SigLIP tower (96 px, patch 12), pixel shuffle
2x2, the five-layer adapter, a Qwen2 LLM. It knows the procedural world of
`flashvl.data.synthetic` and nothing else: coloured shapes, signs, sums and bar charts, in English.
Of anything else it says that it is not a drawing that it knows, or it is wrong.

## How it was made

`make tiny` made it in {minutes} minutes on {machine}: random weights; a pre-training
of the tower (what lies in each cell) and of the LLM (the scenes in words), which stand in for the
published SigLIP2 and Qwen2.5 weights; then the paper's stages 1 to 4 by `ray_jobs/configs/tiny/`.
Every training scene is drawn anew and seen once.

## What it scores

Exact match on held-out scenes, 120 questions a task, after each stage as in the paper's Table 5
(`flashvl eval scenes --model tiny`):

{table}
"""


if __name__ == "__main__":
    main()
