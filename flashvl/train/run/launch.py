"""Runs a stage on Ray Train, from its recipe to the finished model, through lost workers and nodes.

output_dir/
    _manifest.json, _lock       what decides the weights; see `flashvl.data.ledger`
    checkpoints/                see `flashvl.train.run.checkpoint`
    steps/, dead_letters/       see `flashvl.train.run.parts`
    runs/                       TensorBoard
    training_log.json           totals, and a record of each step
    config.json, ...            the model as a Hugging Face folder, `config.json` written last
"""

import os

import ray

from flashvl.data.ledger.lock import held
from flashvl.data.ledger.manifest import has_begun, write_manifest
from flashvl.errors import ConfigError
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.train.recipe import AnyRecipe, Recipe
from flashvl.train.run.attempts import run_attempts
from flashvl.train.run.stage import Stage, StageResult, check_resumes, check_stage


def run(recipe: AnyRecipe, on_progress: ShowProgress = ignore_progress) -> StageResult:
    """Train the stage on the Ray cluster that this process is connected to, or what is left of it.

    Args:
        on_progress: shows the steps that are done, with figures of the last one.

    Raises:
        ConfigError, CheckpointError: the recipe cannot be run; nothing was started.
        FlashVLError: the run cannot go on, or SIGTERM has stopped it.
        RankError: a worker has failed; the message holds its traceback.
    """
    return run_stage(check_stage(recipe), on_progress)


def run_stage(stage: Stage, on_progress: ShowProgress = ignore_progress) -> StageResult:
    """What `run` does after `check_stage`."""
    if (result := stage.finished()) is not None:
        return result
    resources = resources_of_a_worker(stage.recipe)
    with held(stage.output):
        if has_begun(stage.output):
            check_resumes(stage)
        else:
            write_manifest(stage.output, stage.fingerprint)
        stage.output.remove_unfinished()
        run_attempts(stage, resources, on_progress)
    result = stage.finished()
    assert result is not None
    return result


def resources_of_a_worker(recipe: Recipe) -> dict[str, float]:
    """Resources that Ray reserves for each worker.

    Raises:
        ConfigError: a local Ray, which cannot grow, has too few for all workers and the data tasks;
            Ray Train would wait for ever.
    """
    resources: dict[str, float] = {"CPU": recipe.threads_per_worker}
    if recipe.use_gpu:
        resources["GPU"] = 1
    if "RAY_ADDRESS" in os.environ:  # a cluster, which may scale up
        return resources
    available = ray.cluster_resources()
    for name, spare in (("GPU", 0), ("CPU", 1)):
        needed = recipe.num_workers * resources.get(name, 0) + spare
        if needed > available.get(name, 0):
            raise ConfigError(
                f"num_workers ({recipe.num_workers}) needs {needed:.0f} {name}s, this machine's Ray"
                f" has {available.get(name, 0):.0f}; set RAY_ADDRESS to a cluster, or lower"
                " num_workers and set use_gpu=false"
            )
    return resources
