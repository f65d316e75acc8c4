"""Runs the stages of a pipeline, and scores the model of each.

ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
    python ray_jobs/pipeline.py ray_jobs/configs/pipelines/tiny.yaml
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from flashvl.data.synthetic import REASONING_TASKS, TASKS
from flashvl.engine import Engine
from flashvl.eval.scenes import evaluate_scenes
from flashvl.progress import ShowProgress
from flashvl.train.pipeline import Pipeline, Record, run_pipeline
from flashvl.train.recipe import AnyRecipe
from flashvl.train.run.launch import run


def run_and_score(
    pipeline: Pipeline,
    show: Callable[[str], AbstractContextManager[ShowProgress]],
    tell: Callable[[Record], None],
) -> list[Record]:
    """Run what is left of a pipeline on the Ray cluster that this process is connected to.

    Args:
        show: shows the progress of a stage, whose name it is given.
        tell: called with the record of each stage that was run now.

    Returns:
        The records of all stages.

    Raises:
        FlashVLError: as from `train.launch.run`, or the pipeline is wrong.
    """

    def run_stage(recipe: AnyRecipe) -> Record:
        with show(recipe.stage) as on_progress:
            result = run(recipe, on_progress)
        return {
            "rows": result.num_trained,
            "loss": round(result.loss, 4),
            "seconds": round(result.seconds, 1),
        }

    tasks = (*TASKS, *REASONING_TASKS) if pipeline.evaluation == "problems" else TASKS

    def score(model: str) -> Mapping[str, float]:
        with show("asking") as on_progress:
            engine = Engine.from_pretrained(model)
            scores = evaluate_scenes(engine, on_progress=on_progress, tasks=tasks)
        return {task: round(score.exact_match, 3) for task, score in scores.items()}

    return run_pipeline(pipeline, run_stage, score, tell)
