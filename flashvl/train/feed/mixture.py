"""What a stage is trained on: a table, a mixture of tables, or the procedural world."""

from pathlib import Path
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from flashvl.config import StrictModel, load_config
from flashvl.data import synthetic
from flashvl.errors import ConfigError


class SyntheticData(StrictModel):
    """Rows of the procedural world, which are drawn as they are read."""

    count: PositiveInt
    """Number of rows."""
    seed: int = 0
    """Random seed of the scenes; different seeds give different scenes."""
    split: synthetic.Split = "train"
    """Split of the world: `heldout` is for evaluation, as none of its scenes is in `train`."""
    tasks: tuple[synthetic.Task, ...] = synthetic.TASKS
    """Tasks that the questions are about; one that is named twice is drawn twice as often. Pairs
    are about captions, whatever the tasks."""
    words_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the rows whose scene is described in words, not shown: 1 pre-trains an LLM alone, a
    smaller share mixes text with pictures, as Infinity-MM does."""
    worked_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the problems' answers that are worked out, with the answer in tags at the end;
    others are the answer alone."""
    replay_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the rows that are about a picture and a reading task, whatever the other fields say,
    so that what was learnt before is not forgotten."""
    is_large: bool | None = None
    """Whether pictures are large, 192 x 192 pixels, with words and shapes in any of 7 x 7 cells;
    the tasks are reading tasks then. None is False."""

    @model_validator(mode="after")
    def _large_for_reading(self) -> Self:
        problems = [task for task in self.tasks if task not in synthetic.TASKS]
        if self.is_large and problems:
            raise ValueError(
                f"is_large goes with reading tasks, not {problems[0]}; leave out one of them"
            )
        return self


class TrainingData(StrictModel):
    """Source of the rows; exactly one field is set."""

    parquet: str | None = None
    """Table with the schema `flashvl.data.schema.CONVERSATIONS`: a Parquet file, a folder or a
    pattern of them, as a path or a URI. The seed of the recipe shuffles its rows."""
    mixture: Path | None = None
    """YAML file that names several tables (`Mixture`); a path from the recipe's folder."""
    synthetic: SyntheticData | None = None
    """Rows of the procedural world."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [self.parquet, self.mixture, self.synthetic]
        if sum(source is not None for source in given) != 1:
            raise ValueError("give exactly one of data.parquet, data.mixture and data.synthetic")
        return self


class MixtureTable(StrictModel):
    """A table of a mixture, all of whose rows are taken unless a field says otherwise."""

    path: str
    """Table, as in `TrainingData.parquet`."""
    count: PositiveInt | None = None
    """Rows to take of the table, which the seed chooses."""
    weight: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Share of the table among the tables with a weight; as many of their rows are taken as these
    shares allow, none twice."""

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if self.count is not None and self.weight is not None:
            raise ValueError(f"{self.path} has a count and a weight; leave out one")
        return self


class Mixture(StrictModel):
    """The tables of a stage, which are interleaved."""

    tables: tuple[MixtureTable, ...] = Field(min_length=1)
    """Tables, each named once."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        paths = [table.path for table in self.tables]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise ValueError(f"{twice} is named twice; name it once, with the count of both")
        return self


def load_tables(data: TrainingData) -> tuple[MixtureTable, ...]:
    """The tables of data that is not synthetic.

    Raises:
        ConfigError: the mixture's file cannot be read, or is wrong.
    """
    if data.parquet is not None:
        return (MixtureTable(path=data.parquet),)
    assert data.mixture is not None
    return load_config(Mixture, data.mixture).tables


def count_taken(tables: tuple[MixtureTable, ...], num_rows: list[int]) -> list[int]:
    """The number of rows to take of each table, of which it has `num_rows`.

    Raises:
        ConfigError: a table has fewer rows than its count, or none by its weight.
    """
    scale = min(
        (
            held / table.weight
            for table, held in zip(tables, num_rows, strict=True)
            if table.weight is not None
        ),
        default=0.0,
    )
    counts = []
    for table, held in zip(tables, num_rows, strict=True):
        count = held if table.count is None else table.count
        if table.weight is not None:
            count = min(held, round(scale * table.weight))
        if not 0 < count <= held:
            raise ConfigError(
                f"table {table.path} has {held} rows, of which {count} are to be taken; correct its"
                " count or weight, or give more rows"
            )
        counts.append(count)
    return counts
