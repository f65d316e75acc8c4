"""The recipes of the repository, and small tables under the names of their mixtures."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from flashvl.data import synthetic
from flashvl.data.schema import CONVERSATIONS
from flashvl.train.feed.mixture import load_tables
from flashvl.train.recipe import load_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "ray_jobs" / "configs"
RECIPES = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.relative_to(CONFIGS).parts[0] not in ("mixtures", "pipelines")
)


def name_of(recipe: Path) -> str:
    """The recipe's path in the folder of all recipes, without the file's ending."""
    return str(recipe.relative_to(CONFIGS).with_suffix(""))


def write_table(folder: Path, num_rows: int, words_share: float = 0.5) -> None:
    """A table of conversations about scenes, of which some are described in words."""
    folder.mkdir(parents=True)
    samples = synthetic.samples("train", seed=9, count=num_rows)
    rows = [synthetic.conversation(drawn, row, words_share) for row, drawn in enumerate(samples)]
    table = pa.Table.from_pylist(
        [{name: row[name] for name in CONVERSATIONS.names} for row in rows], CONVERSATIONS
    )
    pq.write_table(table, folder / "part-0.parquet", row_group_size=8)


def shrink_data(recipe: Path, folder: Path, num_rows: int) -> list[str]:
    """Overrides under which the recipe reads at least `num_rows` rows from small tables.

    The tables lie in `folder`, under the names of the mixture's.
    """
    data = load_recipe(recipe).data
    if data.synthetic is not None:
        return [f"data.synthetic.count={num_rows}"]
    paths = [folder / Path(table.path).name for table in load_tables(data)]
    share = -(-num_rows // len(paths))
    for path in paths:
        write_table(path, share + 1)
    mixture = folder / "mixture.yaml"
    mixture.write_text(
        yaml.safe_dump({"tables": [{"path": str(path), "count": share} for path in paths]})
    )
    return [f"data={{mixture: {mixture}}}"]
