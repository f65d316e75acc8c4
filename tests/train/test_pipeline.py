"""Pipelines: the chain, where it goes on, its table of scores, and what is refused."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashvl.errors import ConfigError, FlashVLError
from flashvl.progress import ignore_progress
from flashvl.train.pipeline import Pipeline, Record, load_pipeline, render_scores, run_pipeline
from flashvl.train.recipe import AnyRecipe
from flashvl.train.run.export import read_log
from tests.support.recipes import CONFIGS, RECIPES

RECIPE = CONFIGS / "static" / "stage1.yaml"
PIPELINES = sorted((CONFIGS / "pipelines").glob("*.yaml"))
STAGES = [*(f"stage{number}" for number in range(1, 6)), "reasoning_sft", "grpo"]
"""Stages of the static pipeline."""


class Runs:
    """Stands in for training and evaluation; a stage may be told to fail."""

    def __init__(self) -> None:
        self.trained: list[AnyRecipe] = []
        self.scored: list[str] = []
        self.told: list[str] = []
        self.failing: str | None = None

    def train(self, recipe: AnyRecipe) -> Record:
        if recipe.stage == self.failing:
            raise FlashVLError("stopped by SIGTERM")
        self.trained.append(recipe)
        return {"rows": 1000, "loss": 0.5, "seconds": 12.3}

    def score(self, model: str) -> dict[str, float]:
        self.scored.append(model)
        return {"count": 0.5, "read": 1.0}

    def of(self, pipeline: Pipeline) -> list[Record]:
        return run_pipeline(
            pipeline, self.train, self.score, lambda record: self.told.append(record["stage"])
        )


def write(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def static_stages(folder: Path, *overrides: str) -> Pipeline:
    """The static pipeline in a folder of its own."""
    return load_pipeline(
        CONFIGS / "pipelines" / "static.yaml",
        [f"output_dir={folder / 'run'}", "evaluation=scenes", *overrides],
    )


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_pipeline_in_the_repository_loads(path: Path) -> None:
    """Its stages have the folders that their recipes name, so that each can be run alone."""
    recipes = load_pipeline(path).recipes()
    named = {each.stem: each for each in RECIPES if each.parent.name == path.stem}
    assert {recipe.stage for recipe in recipes} == set(named)
    for before, after in zip(recipes, recipes[1:], strict=False):
        assert after.init_from == before.output_dir
    assert all(recipe.output_dir == f"runs/{path.stem}/{recipe.stage}" for recipe in recipes)


def test_stages_are_chained_and_scored(tmp_path: Path) -> None:
    runs = Runs()
    pipeline = static_stages(tmp_path, "overrides=[num_workers=8]", "init_from=/models/mine")
    records = runs.of(pipeline)
    stages = [f"{tmp_path}/run/{stage}" for stage in STAGES]
    assert [recipe.init_from for recipe in runs.trained] == ["/models/mine", *stages[:-1]]
    assert [recipe.output_dir for recipe in runs.trained] == runs.scored == stages
    assert all(recipe.num_workers == 8 for recipe in runs.trained)
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == records
    lines = (tmp_path / "run" / "scores.md").read_text().splitlines()
    assert lines[0] == "| stage | rows | seconds | loss | count | read | average |"
    assert lines[2] == "| stage1 | 1,000 | 12 | 0.5000 | 0.500 | 1.000 | 0.750 |"
    assert len(lines) == 2 + len(records)


def test_a_stopped_pipeline_goes_on_at_the_stage_that_was_not_finished(tmp_path: Path) -> None:
    runs = Runs()
    runs.failing = "stage3"
    with pytest.raises(FlashVLError, match="SIGTERM"):
        runs.of(static_stages(tmp_path))
    assert runs.told == ["stage1", "stage2"]
    runs.failing = None
    records = runs.of(static_stages(tmp_path))
    assert [recipe.stage for recipe in runs.trained] == STAGES
    assert runs.told == [record["stage"] for record in records]
    assert runs.of(static_stages(tmp_path)) == records  # nothing is left to do
    assert len(runs.trained) == len(STAGES)


def test_a_stage_that_cannot_answer_yet_is_not_scored(tmp_path: Path) -> None:
    runs = Runs()
    pipeline = load_pipeline(
        CONFIGS / "pipelines" / "tiny.yaml",
        [f"output_dir={tmp_path}", "start=", "init_from=tiny"],
    )
    records = runs.of(pipeline)
    assert [record["scores"] is None for record in records] == [True, True, *[False] * 4]
    table = render_scores(records).splitlines()
    assert table[2] == "| tower | 1,000 | 12 | 0.5000 | - | - | - |"
    assert table[-1].startswith("| stage4 |")


def test_the_model_to_begin_with_is_made_once(tmp_path: Path) -> None:
    overrides = [f"output_dir={tmp_path}", "evaluation="]
    runs = Runs()
    runs.failing = "stage1"
    for _ in range(2):
        with pytest.raises(FlashVLError):
            runs.of(load_pipeline(CONFIGS / "pipelines" / "tiny-iss.yaml", overrides))
    assert (tmp_path / "start" / "config.json").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{recipe: x.yaml}]", "missing key 'output_dir'"),
        ("{output_dir: out, stages: []}", "stages=[]"),
        ("{output_dir: out, stages: [{recipe: x.yaml}]}", "x.yaml"),
        (
            "{output_dir: out, stages: [{recipe: R, overides: [seed=1]}]}",
            "Did you mean 'overrides'",
        ),
        ("{output_dir: out, stages: [{recipe: R}, {recipe: R}]}", "stage stage1 is there twice"),
        ("{output_dir: out, evaluation: mmmu, stages: [{recipe: R}]}", "evaluation='mmmu'"),
        (
            "{output_dir: out, init_from: a, start: {preset: tiny}, stages: [{recipe: R}]}",
            "init_from or start",
        ),
        ("{output_dir: out, stages: [{recipe: R, overrides: [sed=1]}]}", "unknown key 'sed'"),
    ],
)
def test_bad_pipelines_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text.replace("R,", f"{RECIPE},").replace("R}", f"{RECIPE}}}"))
    with pytest.raises(ConfigError) as error:
        load_pipeline(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_with_other_stages_scores_is_refused(tmp_path: Path) -> None:
    Runs().of(static_stages(tmp_path))
    other = load_pipeline(
        CONFIGS / "pipelines" / "ablation.yaml", [f"output_dir={tmp_path / 'run'}"]
    )
    with pytest.raises(ConfigError, match="holds scores of the stages stage1, stage2"):
        Runs().of(other)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_pipeline_that_is_stopped_goes_on_at_its_step(
    ray_cluster: None, tmp_path: Path, random_folder: Callable[[str], Path]
) -> None:
    """Two stages of `tiny`, stopped in the second after a checkpoint; then the same again."""
    from flashvl.eval.pipeline import run_and_score

    sizes = "data.synthetic.count=160, global_batch_size=8, save_steps=5"
    text = (
        f"output_dir: {tmp_path / 'run'}\ninit_from: {random_folder('tiny')}\n"
        f"evaluation: scenes\noverrides: [{sizes}]\nstages:\n"
        f"  - recipe: {CONFIGS / 'tiny' / 'stage1.yaml'}\n"
        f"  - recipe: {CONFIGS / 'tiny' / 'stage2.yaml'}\n"
    )
    pipeline = load_pipeline(write(tmp_path, text))
    stops = ["stage2"]
    told: list[str] = []

    @contextlib.contextmanager
    def show(what: str) -> Iterator[Any]:
        def on_progress(done: int, total: int, note: str = "") -> None:
            if what in stops and 6 < done < 15:
                stops.remove(what)
                os.kill(os.getpid(), signal.SIGTERM)

        yield on_progress if what in stops else ignore_progress

    def run() -> list[Record]:
        return run_and_score(pipeline, show, lambda record: told.append(record["stage"]))

    with pytest.raises(FlashVLError, match="run the same command again"):
        run()
    assert told == ["stage1"]
    records = run()
    assert told == ["stage1", "stage2"]
    assert [record["rows"] for record in records] == [160, 160]
    steps = [record["step"] for record in read_log(tmp_path / "run" / "stage2")]
    assert steps == list(range(1, 21))
    assert all(0 <= score <= 1 for record in records for score in record["scores"].values())
    assert (tmp_path / "run" / "scores.md").read_text() == render_scores(records)
