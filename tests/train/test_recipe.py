"""Recipes: every file loads, holds the paper's numbers, and is refused in one line if wrong."""

import os
from pathlib import Path

import pytest

from flashvl.errors import ConfigError
from flashvl.train.recipe import AnyRecipe, load_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "ray_jobs" / "configs"
ALL_PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def load(name: str, *overrides: str) -> AnyRecipe:
    return load_recipe(CONFIGS / name, overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    assert load_recipe(path).stage == path.stem


@pytest.mark.parametrize(
    ("stage", "trainable", "learning_rate", "min_learning_rate"),
    [
        ("stage1", ("multi_modal_projector",), 1e-3, 2e-5),
        ("stage2", ALL_PARTS, 1e-5, 0.0),
        ("stage3", ALL_PARTS, 1e-5, 0.0),
        ("stage4", ALL_PARTS, 1e-5, 0.0),
    ],
)
def test_stages_follow_table_1(
    stage: str, trainable: tuple[str, ...], learning_rate: float, min_learning_rate: float
) -> None:
    recipe = load(f"{stage}.yaml")
    assert recipe.trainable == trainable
    assert recipe.learning_rate == learning_rate
    assert recipe.min_learning_rate == min_learning_rate
    assert (recipe.global_batch_size, recipe.num_workers) == (240, 40)
    assert recipe.gradient_accumulation_steps == 1


@pytest.mark.parametrize("folder", [".", "tiny"])
def test_each_stage_starts_where_the_one_before_ended(folder: str) -> None:
    recipes = [load(f"{folder}/stage{number}.yaml") for number in (1, 2, 3, 4)]
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
        ("global_batch_size=250", "global_batch_size (250) must be divisible by"),
        ("learning_rate=-1", "learning_rate=-1"),
        ("min_learning_rate=1", "min_learning_rate (1.0) is above learning_rate"),
        ("kind=cells", "kind 'cells' needs data.synthetic"),
        ("kind=dpo", "kind='dpo': must be one of supervised, cells"),
        ("kind=", "kind=None"),
        ("data.synthetic={count: 4}", "exactly one of data.parquet and data.synthetic"),
        ("trainable=[tower]", "'tower'"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("stage1.yaml", override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_batch_error_proposes_a_size_that_works() -> None:
    with pytest.raises(ConfigError, match="Try global_batch_size=240"):
        load("stage1.yaml", "global_batch_size=250")
    assert load("stage1.yaml", "global_batch_size=480").gradient_accumulation_steps == 2


def test_a_recipe_without_a_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text("stage: stage1\n")
    with pytest.raises(ConfigError, match="missing key 'kind'"):
        load_recipe(tmp_path / "stage.yaml")


def test_a_recipe_comes_through_a_pipe() -> None:
    """A file that can be read once only, as of `flashvl train <(...)`."""
    reading, writing = os.pipe()
    with open(writing, "wb") as pipe:
        pipe.write((CONFIGS / "stage1.yaml").read_bytes())
    try:
        assert load_recipe(f"/dev/fd/{reading}", ["seed=7"]) == load("stage1.yaml", "seed=7")
    finally:
        os.close(reading)
