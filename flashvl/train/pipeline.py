"""A chain of stages, each of which starts from the model of the one before.

Run again, it goes on at the stage that was not finished, which resumes at its last checkpoint.
After each stage its scores are added to the pipeline's table, as in the paper's Table 5:

    output_dir/
        STAGE/         folder of each stage, as `flashvl.train.run.launch` writes it
        scores.json    a record of each finished stage
        scores.md      the same as a table

How a model is scored is the caller's matter, as evaluation lies above training.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from flashvl.config import StrictModel, load_config
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError
from flashvl.train.recipe import AnyRecipe, load_recipe

SCORES, TABLE = "scores.json", "scores.md"
Record = dict[str, Any]
"""A finished stage: `stage`, `rows`, `loss`, `seconds`, and `scores` by task, None if not asked."""


class Start(StrictModel):
    """A model to begin with, which is made before the first stage."""

    preset: str
    """Preset of the procedural world whose shapes it has."""
    parts_of: str | None = None
    """Model whose tower, LLM and, where it fits, adapter it takes; None draws all weights."""


class PipelineStage(StrictModel):
    """A stage of a pipeline."""

    recipe: Path
    """Recipe file; a path from the pipeline's folder. The chain's folders replace its `init_from`
    and `output_dir`; a first stage keeps its `init_from` if the pipeline has none."""
    overrides: tuple[str, ...] = ()
    """Values that replace the recipe's, as `key=value`."""
    evaluate: bool = True
    """Whether the stage's model is scored; a pre-trained part cannot answer yet."""


class Pipeline(StrictModel):
    """The stages of a training, in their order."""

    output_dir: str
    """Folder for the stages' folders and the table of scores."""
    init_from: str | None = None
    """Checkpoint that the first stage starts from; None: the one that its recipe names."""
    start: Start | None = None
    """Model that is made in `output_dir`/start, for the first stage to start from."""
    overrides: tuple[str, ...] = ()
    """Values that replace those of every recipe, as `key=value`."""
    evaluation: Literal["scenes", "problems"] | None = None
    """Evaluation after each stage: `scenes`, the held-out scenes of the procedural world;
    `problems`, its held-out problems as well; None: none."""
    stages: tuple[PipelineStage, ...] = Field(min_length=1)
    """Stages, each under a name of its own."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.init_from is not None and self.start is not None:
            raise ValueError("give init_from or start, not both")
        return self

    def recipes(self) -> list[AnyRecipe]:
        """The recipes of the stages, chained.

        Raises:
            ConfigError: a recipe is wrong, or two stages have the same name.
        """
        recipes: list[AnyRecipe] = []
        before = f"{self.output_dir}/start" if self.start is not None else self.init_from
        for stage in self.stages:
            overrides = [*self.overrides, *stage.overrides]
            recipe = load_recipe(stage.recipe, overrides)
            if recipe.stage in [each.stage for each in recipes]:
                raise ConfigError(
                    f"{stage.recipe}: stage {recipe.stage} is there twice; give one of them another"
                    " name, as overrides: [stage=NAME]"
                )
            folder = f"{self.output_dir}/{recipe.stage}"
            chain = [f"output_dir={folder}"] + ([] if before is None else [f"init_from={before}"])
            recipes.append(load_recipe(stage.recipe, [*overrides, *chain]))
            before = folder
        return recipes


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline in the YAML file `path`, whose recipes are found from there.

    Raises:
        ConfigError: the file cannot be read, or it or one of its recipes is wrong.
    """
    pipeline = load_config(Pipeline, path, overrides)
    stages = (
        stage.model_copy(update={"recipe": Path(path).parent / stage.recipe})
        for stage in pipeline.stages
    )
    pipeline = pipeline.model_copy(update={"stages": tuple(stages)})
    pipeline.recipes()
    return pipeline


class _AnyFile(StrictModel):
    """A recipe or a pipeline, whose keys their own classes check."""

    model_config = ConfigDict(extra="allow")


def load_stages(path: str | Path, overrides: Sequence[str] = ()) -> list[AnyRecipe]:
    """The recipes of a pipeline's file, or the one recipe of another file.

    Raises:
        ConfigError: the file cannot be read, or is wrong.
    """
    if Path(path).is_file() and "stages" in (load_config(_AnyFile, path).model_extra or {}):
        return load_pipeline(path, overrides).recipes()
    return [load_recipe(path, overrides)]


def run_pipeline(
    pipeline: Pipeline,
    run_stage: Callable[[AnyRecipe], Record],
    score: Callable[[str], Mapping[str, float]],
    tell: Callable[[Record], None],
) -> list[Record]:
    """Run the stages that are not finished, and score their models.

    Args:
        run_stage: trains a stage; it returns `rows`, `loss` and `seconds`.
        score: the scores of the model in a folder, by task.
        tell: called with the record of each stage that was run now.

    Returns:
        the records of all stages.

    Raises:
        ConfigError: a recipe is wrong, or the folder holds the scores of other stages.
    """
    recipes = pipeline.recipes()
    output = locate(pipeline.output_dir)
    records = read_records(output)
    names = [recipe.stage for recipe in recipes]
    done = [record["stage"] for record in records]
    if done != names[: len(done)]:
        raise ConfigError(
            f"{output} holds scores of the stages {', '.join(done)}, the pipeline has"
            f" {', '.join(names)}; name another output_dir"
        )
    output.make_folder()
    if not done:
        _make_start(pipeline)
    for stage, recipe in list(zip(pipeline.stages, recipes, strict=True))[len(done) :]:
        record: Record = {"stage": recipe.stage} | run_stage(recipe)
        is_scored = stage.evaluate and pipeline.evaluation is not None
        record["scores"] = dict(score(str(recipe.output_dir))) if is_scored else None
        records.append(record)
        (output / SCORES).write(json.dumps(records, indent=2).encode() + b"\n")
        (output / TABLE).write(render_scores(records).encode())
        tell(record)
    return records


def read_records(output: Location) -> list[Record]:
    """The records of the stages that are finished."""
    file = output / SCORES
    return json.loads(file.read()) if file.is_file() else []


def render_scores(records: Sequence[Record]) -> str:
    """A Markdown table with a line for each stage."""
    tasks = list(dict.fromkeys(task for record in records for task in record["scores"] or ()))
    columns = ["stage", "rows", "seconds", "loss", *tasks, *(["average"] if tasks else [])]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for record in records:
        scores = record["scores"] or {}
        cells = [
            record["stage"],
            *(
                "-" if record[name] is None else f"{record[name]:{form}}"
                for name, form in (("rows", ","), ("seconds", ".0f"), ("loss", ".4f"))
            ),
            *(f"{scores[task]:.3f}" if task in scores else "-" for task in tasks),
        ]
        if tasks:
            cells.append(f"{sum(scores.values()) / len(scores):.3f}" if scores else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _make_start(pipeline: Pipeline) -> None:
    """Write the model to begin with, unless an earlier run did."""
    from flashvl.train.create import create_random, create_variant

    folder = Path(pipeline.output_dir) / "start"
    if pipeline.start is None or (folder / "config.json").exists():
        return
    if pipeline.start.parts_of is None:
        create_random(pipeline.start.preset, folder)
    else:
        create_variant(pipeline.start.parts_of, pipeline.start.preset, folder)
