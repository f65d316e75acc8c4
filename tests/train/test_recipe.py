"""Recipes: every file loads, holds the paper's numbers, and is refused in one line if wrong."""

import os
from pathlib import Path

import pytest

from flashvl.errors import ConfigError
from flashvl.model.presets import build_config
from flashvl.train.feed.mixture import load_tables
from flashvl.train.parameters import count_parameters
from flashvl.train.recipe import AnyRecipe, DpoRecipe, load_recipe
from tests.support.recipes import CONFIGS, RECIPES, name_of

ALL_PARTS = ("vision_tower", "multi_modal_projector", "language_model")
FULL_SIZE = ("static", "dynamic", "iss")


def load(name: str, *overrides: str) -> AnyRecipe:
    return load_recipe(CONFIGS / name, overrides)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stage == path.stem
    assert recipe.preset is not None
    if recipe.num_trainable_params is not None:
        rank = recipe.lora.r if recipe.lora is not None else None
        counted = count_parameters(build_config(recipe.preset), recipe.trainable, rank)
        assert counted.num_trained == recipe.num_trainable_params


@pytest.mark.parametrize("preset", FULL_SIZE)
@pytest.mark.parametrize(
    ("stage", "trainable", "learning_rate", "min_learning_rate", "num_rows"),
    [
        ("stage1", ("multi_modal_projector",), 1e-3, 2e-5, 10_000_000),
        ("stage2", ALL_PARTS, 1e-5, 0.0, 24_000_000),
        ("stage3", ALL_PARTS, 1e-5, 0.0, 6_000_000),
        ("stage4", ALL_PARTS, 1e-5, 0.0, 10_000_000),
    ],
)
def test_stages_follow_table_1(
    preset: str,
    stage: str,
    trainable: tuple[str, ...],
    learning_rate: float,
    min_learning_rate: float,
    num_rows: int,
) -> None:
    recipe = load(f"{preset}/{stage}.yaml")
    assert recipe.trainable == trainable
    assert recipe.learning_rate == learning_rate
    assert recipe.min_learning_rate == min_learning_rate
    assert (recipe.global_batch_size, recipe.num_workers) == (240, 40)
    assert sum(table.count or 0 for table in load_tables(recipe.data)) == num_rows
    assert recipe.num_trainable_params is not None


def test_stage_4_has_the_21_sources_of_the_papers_table() -> None:
    tables = load_tables(load("static/stage4.yaml").data)
    assert len(tables) == len({table.path for table in tables}) == 21


@pytest.mark.parametrize("preset", FULL_SIZE)
def test_stage_5_follows_the_paper(preset: str) -> None:
    """Section 3.3, Table 1 and section 4.1: LoRA on LLM and adapter, beta 0.1, 87k pairs, once."""
    recipe = load(f"{preset}/stage5.yaml")
    assert isinstance(recipe, DpoRecipe)
    assert (recipe.beta, recipe.trainable) == (0.1, ALL_PARTS[1:])
    assert recipe.lora is not None
    with pytest.raises(ConfigError, match="beta=0"):
        load(f"{preset}/stage5.yaml", "beta=0")
    assert (recipe.global_batch_size, recipe.num_workers) == (240, 40)
    assert sum(table.count or 0 for table in load_tables(recipe.data)) == 87_000


def test_ablations_have_the_papers_setting() -> None:
    """Section 4.1: 8 GPUs, 48 rows a step, 400 steps of warm-up; 2.5M rows, then 665K."""
    for stage, learning_rates, num_rows in (
        ("pretrain", (1e-3, 2e-5), 2_551_000),
        ("finetune", (1e-5, 0.0), 665_000),
    ):
        recipe = load(f"ablation/{stage}.yaml")
        assert (recipe.num_workers, recipe.global_batch_size, recipe.warmup_steps) == (8, 48, 400)
        assert (recipe.learning_rate, recipe.min_learning_rate) == learning_rates
        assert sum(table.count or 0 for table in load_tables(recipe.data)) == num_rows


@pytest.mark.parametrize("folder", [*FULL_SIZE, "tiny"])
def test_each_stage_starts_where_the_one_before_ended(folder: str) -> None:
    numbers = range(1, 6) if folder in FULL_SIZE else range(1, 5)
    recipes = [load(f"{folder}/stage{number}.yaml") for number in numbers]
    for before, after in zip(recipes, recipes[1:], strict=False):
        assert after.init_from == str(before.output_dir)


def test_tiny_never_sees_a_scene_series_twice() -> None:
    stages = ["tower", "llm", "stage1", "stage2", "stage3", "stage4"]
    data = [load(f"tiny/{stage}.yaml").data.synthetic for stage in stages]
    assert len({spec.seed for spec in data if spec is not None}) == len(stages)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learing_rate=1", "unknown key 'learing_rate'. Did you mean 'learning_rate'?"),
        ("data.sythetic={}", "unknown key 'data.sythetic'. Did you mean 'synthetic'?"),
        ("per_device_train_batch_size=6", "unknown key 'per_device_train_batch_size'"),
        ("learning_rate=-1", "learning_rate=-1"),
        ("learning_rate=.nan", "learning_rate=nan"),
        ("min_learning_rate=1", "min_learning_rate (1.0) is above learning_rate"),
        ("max_length=9999", "max_length (9999) is above token_budget (4096)"),
        ("learning_rates={language_model: 1e-5}", "learning_rates has language_model"),
        ("kind=cells", "kind 'cells' needs data.synthetic"),
        ("kind=ppo", "kind='ppo': must be one of supervised, cells"),
        ("kind=", "kind=None"),
        ("data.synthetic={count: 4}", "exactly one of data.parquet, data.mixture and data.synth"),
        ("trainable=[tower]", "'tower'"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("static/stage1.yaml", override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_without_a_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text("stage: stage1\n")
    with pytest.raises(ConfigError, match="missing key 'kind'"):
        load_recipe(tmp_path / "stage.yaml")


def test_a_recipe_comes_through_a_pipe() -> None:
    """A file that can be read once only, as of `flashvl train <(...)`."""
    reading, writing = os.pipe()
    with open(writing, "wb") as pipe:
        pipe.write((CONFIGS / "tiny" / "stage1.yaml").read_bytes())
    try:
        assert load_recipe(f"/dev/fd/{reading}", ["seed=7"]) == load("tiny/stage1.yaml", "seed=7")
    finally:
        os.close(reading)
