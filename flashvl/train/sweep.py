"""Runs a stage once for each value of a field, side by side on the cluster, by Ray Tune.

    output_dir/
        beta=0.05/    folder of each trial, as `flashvl.train.run.launch` writes it
        beta=0.1/

The same command again tells finished trials from their folders, and resumes the others.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig, Tuner
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flashvl.data.storage import locate
from flashvl.errors import ConfigError, FlashVLError
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.train.recipe import AnyRecipe, load_recipe
from flashvl.train.run.export import read_log
from flashvl.train.run.launch import resources_of_a_worker, run_stage
from flashvl.train.run.stage import Stage, StageResult, check_stage

FIXED = ("kind", "stage", "output_dir")
"""Fields of a recipe that cannot differ between trials."""
NO_ROOM = {"memory": 1.0}
"""Resources of a trial's own process, which waits for the workers: a byte, as Tune needs some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A finished trial."""

    value: str
    """Value of the field, as it was given."""
    folder: str
    loss: float
    """Loss of the last step."""
    eval_loss: float | None
    """Loss on the held-out rows; None: there are none."""
    eval_accuracy: float | None
    """Accuracy on the held-out rows, of kinds that measure one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """The finished trials of a field's values."""

    field: str
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The trial with the highest held-out accuracy, or else with the lowest loss.

        Accuracy comes first because losses under different values of `beta` cannot be compared.
        """
        return min(
            self.trials,
            key=lambda each: (
                -(each.eval_accuracy or 0.0),
                each.loss if each.eval_loss is None else each.eval_loss,
            ),
        )

    def describe(self) -> dict[str, Any]:
        """The sweep for JSON."""
        return asdict(self) | {"best": self.best.value}

    def __str__(self) -> str:
        names = (self.field, "loss", "eval_loss", "accuracy", "folder")
        rows = [names] + [
            (
                trial.value,
                f"{trial.loss:.4f}",
                "-" if trial.eval_loss is None else f"{trial.eval_loss:.4f}",
                "-" if trial.eval_accuracy is None else f"{trial.eval_accuracy:.3f}",
                trial.folder,
            )
            for trial in self.trials
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, f"best: {self.field}={self.best.value}"])


def load_trials(
    path: str | Path, overrides: Sequence[str], sweep: str
) -> tuple[str, dict[str, AnyRecipe]]:
    """The field of a sweep, and for each of its values the recipe.

    Args:
        sweep: `key=value,value,...`; the key may be dotted, as `lora.r`.

    Raises:
        ConfigError: the sweep has another form, or a recipe is wrong.
    """
    field, _, text = sweep.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not field or len(values) < 2 or not all(values) or len(set(values)) < len(values):
        raise ConfigError(
            f"--sweep {sweep!r} must name a field and at least two different values, as"
            " beta=0.05,0.1,0.2,0.5"
        )
    if field in FIXED:
        raise ConfigError(f"--sweep cannot vary {field}; name another field of the recipe")
    folder = load_recipe(path, overrides).output_dir
    trials = {}
    for value in values:
        own = [f"{field}={value}", f"output_dir={folder}/{field}={value}"]
        trials[value] = load_recipe(path, [*overrides, *own])
    return field, trials


def check_trials(trials: dict[str, AnyRecipe]) -> dict[str, Stage]:
    """The stages of all trials, checked before anything is started.

    Raises:
        ConfigError, CheckpointError: a recipe cannot be run.
    """
    return {value: check_stage(recipe) for value, recipe in trials.items()}


def run_sweep(
    field: str, stages: dict[str, Stage], on_progress: ShowProgress = ignore_progress
) -> Sweep:
    """Run the stages that are not finished, as many at once as the cluster has room for.

    Args:
        stages: for each value of `field` its stage.

    Raises:
        FlashVLError: a trial has failed; the others were run.
    """
    left = {value: stage for value, stage in stages.items() if stage.finished() is None}
    if left:
        _run_all(field, left, len(stages), on_progress)
    trials = []
    for value, stage in stages.items():
        result = stage.finished()
        assert result is not None
        trials.append(_describe(value, result))
    return Sweep(field=field, trials=trials)


def _run_all(field: str, left: dict[str, Stage], total: int, on_progress: ShowProgress) -> None:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # stages write their own
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints even if told not to
    on_progress(total - len(left), total, "")
    with tempfile.TemporaryDirectory() as storage:
        results = Tuner(
            tune.with_resources(_run_trial, NO_ROOM),
            param_space={"stage": tune.grid_search(list(left.values()))},
            tune_config=TuneConfig(max_concurrent_trials=_num_at_once(list(left.values()))),
            run_config=RunConfig(
                name="sweep",
                storage_path=storage,
                verbose=0,
                callbacks=[_Progress(total - len(left), total, on_progress)],
            ),
        ).fit()
    failed = [value for value, stage in left.items() if stage.finished() is None]
    if failed:
        reason = str(results.errors[0]).strip().splitlines()[-1] if results.errors else "stopped"
        raise FlashVLError(
            f"{len(failed)} of {total} trials failed, the first with {field}={failed[0]}: {reason};"
            " run the same command again for what is left"
        )


def _num_at_once(stages: Sequence[Stage]) -> int:
    """Trials that the cluster has resources for at the same time; at least one."""
    available = ray.cluster_resources()
    needed: dict[str, float] = {}
    for stage in stages:
        for name, amount in resources_of_a_worker(stage.recipe).items():
            own = amount * stage.recipe.num_workers + (name == "CPU")  # one to read the rows
            needed[name] = max(needed.get(name, 0.0), own)
    rooms = [int(available.get(name, 0.0) // amount) for name, amount in needed.items() if amount]
    return max(1, min(rooms))


def _run_trial(config: dict[str, Any]) -> None:
    """Run a stage from a trial's process, outside of the resources that Tune gives to a trial.

    There its tasks and workers, which reserve their own, would wait for room for ever.
    """
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]
    run = ray.remote(num_cpus=0, max_retries=0)(run_stage)
    ray.get(run.options(scheduling_strategy=outside).remote(config["stage"]))


class _Progress(Callback):  # type: ignore[misc]
    """Tells how many trials have ended."""

    def __init__(self, done: int, total: int, on_progress: ShowProgress):
        self._done, self._total, self._on_progress = done, total, on_progress

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._count()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._count()

    def _count(self) -> None:
        self._done += 1
        self._on_progress(self._done, self._total, "")


def _describe(value: str, result: StageResult) -> Trial:
    last = read_log(result.checkpoint)[-1]
    return Trial(
        value=value,
        folder=str(locate(result.checkpoint)),
        loss=result.loss,
        eval_loss=result.eval_loss,
        eval_accuracy=last.get("eval_accuracy"),
    )
