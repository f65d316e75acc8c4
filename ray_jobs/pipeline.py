"""Runs a chain of stages as one job, and prints the table of scores after each of them.

ray job submit --working-dir . -- python ray_jobs/pipeline.py ray_jobs/configs/pipelines/static.yaml

The same command again goes on where the last one stopped. KEY=VALUE replaces values of the file, as
in: overrides=[num_workers=8].
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashvl.entrypoint import report_errors, show_progress, start_ray


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE", help="YAML file of the stages")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with report_errors():
        from flashvl.train.pipeline import load_pipeline, render_scores

        pipeline = load_pipeline(arguments.pipeline, arguments.overrides)
        pipeline.recipes()  # a wrong one is refused before Ray starts
        start_ray(include_dashboard=True)
        records = run(pipeline)
        print(render_scores(records), end="")


def run(pipeline: Any) -> list[dict[str, Any]]:
    """Run what is left of a `Pipeline`; prints the record of each stage and returns all."""
    from flashvl.train.pipeline import run_pipeline

    return run_pipeline(
        pipeline, run_stage, score_scenes, lambda record: print(json.dumps(record), flush=True)
    )


def run_stage(recipe: Any) -> dict[str, Any]:
    """Train a stage; returns its rows, its last loss, and its time with the start of workers."""
    from flashvl.train.launch import run

    start = time.perf_counter()
    with show_progress(recipe.stage) as on_progress:
        result = run(recipe, on_progress)
    seconds = round(time.perf_counter() - start, 1)
    return {"rows": result.num_trained, "loss": round(result.loss, 4), "seconds": seconds}


def score_scenes(model: str) -> Mapping[str, float]:
    """Exact match on held-out scenes, by task."""
    from flashvl.engine import Engine
    from flashvl.eval.scenes import evaluate_scenes

    scores = evaluate_scenes(Engine.from_pretrained(model))
    return {task: round(score.exact_match, 3) for task, score in scores.items()}


if __name__ == "__main__":
    main()
