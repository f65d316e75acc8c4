"""Every recipe, run for two steps at debug size: a small random model and small tables."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flashvl.train.plan.row_sizes import count_rows
from flashvl.train.recipe import load_recipe
from flashvl.train.run.launch import run
from tests.support.recipes import CONFIGS, RECIPES, name_of, shrink_data

MODELS = {"dynamic": "tiny-dynamic", "iss": "tiny-iss"}
"""Small presets that cut images as the large ones do; the others do as `tiny`."""
BATCH = 4
DEBUG = (
    "num_workers=2",
    "threads_per_worker=1",
    "use_gpu=false",
    f"global_batch_size={BATCH}",
    "num_trainable_params=",
)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_runs_for_two_steps(
    path: Path, ray_cluster: None, random_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    preset = load_recipe(path).preset or ""
    overrides = [
        *DEBUG,
        f"init_from={random_folder(MODELS.get(preset, preset if 'tiny' in preset else 'tiny'))}",
        f"output_dir={tmp_path / 'output'}",
        *shrink_data(path, tmp_path / "data", 2 * BATCH),
    ]
    recipe = load_recipe(path, overrides)
    result = run(recipe)
    rows = count_rows(recipe)
    assert result.num_trained + result.num_dead == rows
    assert result.num_dead == 0
    assert result.num_steps == -(-rows // BATCH)
    assert result.loss > 0
    assert (tmp_path / "output" / "config.json").is_file()


def test_recipes_of_the_repository_are_found() -> None:
    assert len(RECIPES) >= 24
    assert CONFIGS / "static" / "stage2.yaml" in RECIPES
