"""GRPO's recipes: the paper's numbers, and refusals in one line."""

import json
from pathlib import Path

import pytest

from flashvl.errors import ConfigError
from flashvl.train.feed.mixture import load_tables
from flashvl.train.recipe import GrpoRecipe, load_recipe
from flashvl.train.run.stage import check_stage
from tests.support.recipes import CONFIGS


@pytest.mark.parametrize("preset", ["static", "dynamic", "iss"])
def test_reasoning_follows_appendix_b(preset: str) -> None:
    """Groups of 24, KL 0.001; 240 completions a step on 40 GPUs; one epoch of some 7,690 rows."""
    recipe = load_recipe(CONFIGS / preset / "grpo.yaml")
    assert isinstance(recipe, GrpoRecipe)
    assert (recipe.num_generations, recipe.beta) == (24, 0.001)
    assert recipe.global_batch_size * recipe.num_generations == 240
    assert recipe.num_workers == 40
    assert recipe.rewards == {"accuracy": 1.0, "format": 1.0}
    assert sum(table.count or 0 for table in load_tables(recipe.data)) == 7600
    a_gpus_share = recipe.max_length + 6 * recipe.max_completion_length
    assert a_gpus_share <= recipe.token_budget


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_completion_length=9000", "max_length (1024) and max_completion_length (9000) exceed"),
        ("num_generations=1", "num_generations=1"),
        ("rewards={}", "rewards={}"),
        ("temperature=0", "temperature=0"),
        ("{importance}", "importance_sampling_correction needs temperature=1.0, not 0.5"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(override: str, message: str) -> None:
    overrides = [override]
    if override == "{importance}":
        overrides = ["importance_sampling_correction=true", "temperature=0.5"]
    with pytest.raises(ConfigError) as error:
        load_recipe(CONFIGS / "static" / "grpo.yaml", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 1020}, "max_length (1020) and max_completion_length (40) exceed 1024"),
        ({"rewards": {"no.such.reward": 1.0}}, "rewards: no.such.reward cannot be imported"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_started(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    overrides += ["init_from=tiny", f"output_dir={tmp_path / 'out'}"]
    recipe = load_recipe(CONFIGS / "tiny-reasoning" / "grpo.yaml", overrides)
    with pytest.raises(ConfigError) as error:
        check_stage(recipe)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
