"""Configuration: what is written is what is built, and every mistake is one line that helps."""

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

from flashvl.config import StrictModel, load_config, validate
from flashvl.errors import ConfigError


class Optimizer(StrictModel):
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class Extra(StrictModel):
    warmup_ratio: float = 0.03


class Recipe(StrictModel):
    stage: Literal["pretrain", "align"]
    max_steps: int = Field(default=100, gt=0)
    bf16: bool = False
    name: str | None = None
    optimizer: Optimizer = Optimizer()
    extra: Extra | None = None
    parts: list[Extra] = []

    @field_validator("name")
    @classmethod
    def no_blank(cls, name: str | None) -> str | None:
        if name == "":
            raise ValueError("must not be empty;\nleave it out")
        return name

    @model_validator(mode="after")
    def no_bf16_alignment(self) -> "Recipe":
        if self.stage == "align" and self.bf16:
            raise ValueError("stage align needs bf16=false")
        return self


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Writes a recipe's text to a file."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message_of(path: Path, *overrides: str, **defaults: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, path, overrides, **defaults)
    message = str(caught.value)
    assert message.isprintable(), f"not one line: {message!r}"
    return message


def test_reads_every_value_as_written(recipe: Any) -> None:
    path = recipe(
        "stage: align\nmax_steps: 7\nname: first\n"
        "optimizer:\n  learning_rate: 1e-5\n  betas: [0.5, 0.75]\nextra: {warmup_ratio: 0.25}\n"
    )
    assert load_config(Recipe, path).model_dump() == {
        "stage": "align",
        "max_steps": 7,
        "bf16": False,
        "name": "first",
        "optimizer": {"learning_rate": 0.00001, "betas": (0.5, 0.75)},
        "extra": {"warmup_ratio": 0.25},
        "parts": [],
    }


def test_a_config_cannot_be_changed_afterwards(recipe: Any) -> None:
    config = load_config(Recipe, recipe("stage: align"))
    with pytest.raises(ValueError, match="frozen"):
        config.max_steps = 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage: align\nmax_step: 3", ["'max_step'", "Did you mean 'max_steps'?"]),
        ("stage: align\nzzz: 3", ["'zzz'", "Known keys: bf16, extra, max_steps, name, optimizer"]),
        (
            "stage: align\noptimizer: {learing_rate: 1}",
            ["'optimizer.learing_rate'", "Did you mean 'learning_rate'?"],
        ),
        ("stage: align\noptimizer: {zzz: 1}", ["'optimizer.zzz'", "Known keys: betas, learning"]),
        ("max_steps: 3", ["missing key 'stage'", "stage=VALUE"]),
        ("stage: align\nmax_steps: many", ["max_steps='many'", "integer"]),
        ("stage: align\nmax_steps: 1.5", ["max_steps=1.5", "integer"]),
        ("stage: align\nmax_steps: 0", ["max_steps=0", "greater than 0"]),
        ("stage: dance", ["stage='dance'", "'pretrain' or 'align'"]),
        ("stage: align\noptimizer: 3", ["optimizer=3"]),
        ("stage: align\noptimizer: {betas: [1, x]}", ["optimizer.betas.1='x'", "number"]),
        ("stage: align\nname: ''", ["name=''", "must not be empty"]),
        ("stage: align\nbf16: true", ["stage align needs bf16=false"]),
        ("stage: align\n3: 4", ["3"]),
        ("", ["mapping", "NoneType"]),
        ("- stage\n- align", ["mapping", "list"]),
        ("align", ["mapping", "str"]),
        ("stage: [align\nmax_steps: 3", ["not valid YAML", "line"]),
        ("stage: align\n\tmax_steps: 3", ["not valid YAML", "line"]),
    ],
)
def test_names_the_mistake_and_the_remedy(recipe: Any, text: str, said: list[str]) -> None:
    path = recipe(text)
    message = message_of(path)
    for part in [str(path), *said]:
        assert part in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("stage: align\nextra: {warmup_ratios: 1}", "'extra.warmup_ratios'"),
        ("stage: align\nparts: [{warmup_ratios: 1}]", "'parts.0.warmup_ratios'"),
    ],
)
def test_suggests_keys_of_the_section_that_is_optional_or_in_a_list(
    recipe: Any, text: str, key: str
) -> None:
    message = message_of(recipe(text))
    assert key in message
    assert "Did you mean 'warmup_ratio'?" in message


def test_a_missing_key_of_a_section_is_named_in_full(tmp_path: Path) -> None:
    class Outer(StrictModel):
        inner: Recipe

    with pytest.raises(ConfigError, match="missing key 'inner.stage'.*inner.stage=VALUE"):
        validate(Outer, {"inner": {}}, source="--recipe")


def test_source_begins_the_line() -> None:
    with pytest.raises(ConfigError, match=r"^--recipe: unknown key 'stag'.*'stage'"):
        validate(Recipe, {"stage": "align", "stag": 1}, source="--recipe")


def test_missing_file_and_unreadable_files(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert f"cannot read {missing}: No such file or directory" in message_of(missing)
    assert f"cannot read {tmp_path}: Is a directory" in message_of(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"stage: \xe9t\xe9")
    assert "not valid YAML" in message_of(latin)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("max_steps=3", ["max_steps"], 3),
        ("name=a=b", ["name"], "a=b"),
        ("name='7'", ["name"], "7"),
        ("name=", ["name"], None),
        ("name=null", ["name"], None),
        ("bf16=true", ["bf16"], True),
        ("stage=pretrain", ["stage"], "pretrain"),
        ("optimizer.learning_rate=2e-4", ["optimizer", "learning_rate"], 0.0002),
        ("optimizer.betas=[0.1, 0.2]", ["optimizer", "betas"], (0.1, 0.2)),
        ("extra.warmup_ratio=0.5", ["extra", "warmup_ratio"], 0.5),
        ("extra={warmup_ratio: 0.5}", ["extra", "warmup_ratio"], 0.5),
    ],
)
def test_an_override_sets_one_key(recipe: Any, override: str, path: list[str], value: Any) -> None:
    text = "stage: pretrain\nname: old\noptimizer: {learning_rate: 9}"
    before = load_config(Recipe, recipe(text)).model_dump()
    after = load_config(Recipe, recipe(text), [override]).model_dump()
    expected = before | {path[0]: after[path[0]]}
    if path[0] == "optimizer":
        expected["optimizer"] = before["optimizer"] | {path[1]: value}
    assert after == expected
    for key in path:
        after = after[key]
    assert after == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_steps", ["'max_steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("", ["key=value"]),
        ("max_stepz=3", ["'max_stepz'", "Did you mean 'max_steps'?"]),
        ("optimizer.betaz=3", ["'optimizer.betaz'", "Did you mean 'betas'?"]),
        ("stage.deep=3", ["'stage.deep'", "'stage' is not a section"]),
        ("max_steps=[1, 2", ["'max_steps'", "not valid YAML"]),
        ("max_steps=x\ny", ["max_steps", "integer"]),
        ("max_steps=ten", ["max_steps='ten'", "integer"]),
    ],
)
def test_a_bad_override_is_named(recipe: Any, override: str, said: list[str]) -> None:
    message = message_of(recipe("stage: align"), override)
    for part in said:
        assert part in message


def test_defaults_yield_to_the_file_and_both_to_overrides(recipe: Any) -> None:
    defaults = {"max_steps": 1, "name": "default", "stage": "pretrain"}
    assert load_config(Recipe, recipe("name: n"), **defaults).max_steps == 1
    path = recipe("stage: align\nmax_steps: 2")
    assert load_config(Recipe, path, **defaults).max_steps == 2
    assert load_config(Recipe, path, ["max_steps=3"], **defaults).max_steps == 3
    config = load_config(Recipe, path, ["max_steps=3", "max_steps=4"], **defaults)
    assert (config.max_steps, config.name, config.stage) == (4, "default", "align")


def test_an_override_leaves_the_callers_defaults_alone(recipe: Any) -> None:
    optimizer = {"learning_rate": 0.5}
    config = load_config(
        Recipe, recipe("stage: align"), ["optimizer.learning_rate=0.25"], optimizer=optimizer
    )
    assert config.optimizer.learning_rate == 0.25
    assert optimizer == {"learning_rate": 0.5}


@settings(deadline=None)
@given(key=st.text(max_size=20), text=st.text(max_size=20))
def test_any_override_gives_a_config_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, key: str, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("stage: align")
    try:
        config = load_config(Recipe, path, [f"{key}={text}"])
    except ConfigError as error:
        assert str(error).isprintable()
    else:
        assert key.partition(".")[0].partition("=")[0] in Recipe.model_fields, config
