"""Strict configuration: YAML file -> pydantic model, with dotted overrides from a command line."""

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from flashvl.errors import ConfigError, one_line


class StrictModel(BaseModel):
    """Base of all that is read from a file or a command line; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def pool_of(replicas: str) -> tuple[int, int]:
    """The least and the greatest number of engines that `Replicas` allows."""
    least, _, most = replicas.partition(":")
    return int(least), int(most or least)


def _is_a_range(replicas: str) -> str:
    least, most = pool_of(replicas)
    if most < least:
        raise ValueError("must not begin with the greater number; write MIN:MAX")
    return replicas


Replicas = Annotated[str, Field(pattern=r"^[1-9]\d*(:[1-9]\d*)?$"), AfterValidator(_is_a_range)]
"""Engines: their number, or MIN:MAX."""

Dtype = Literal["auto", "float32", "bfloat16"]
"""Number format of a model for inference; `auto` is the machine's faster one."""

DEFAULT_PROMPT = "Describe the image."
"""Question about an image where the caller asks none."""

ModelT = TypeVar("ModelT", bound=StrictModel)


def load_config(
    model: type[ModelT], path: str | Path, overrides: Sequence[str] = (), **defaults: Any
) -> ModelT:
    """Read the YAML file `path` into `model`; overrides win over the file, the file over defaults.

    Args:
        overrides: `key=value` or `section.key=value`, with the value in YAML.
        defaults: values of keys that the file leaves out.

    Raises:
        ConfigError: the file is missing or not a mapping, or a key or a value is wrong.
    """
    values = copy.deepcopy(defaults) | _read_yaml_mapping(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} must have the form key=value, as seed=1")
        try:
            _set_dotted(values, key.split("."), yaml.safe_load(text))
        except yaml.YAMLError:
            raise ConfigError(f"override {key!r}: {text!r} is not valid YAML; quote it") from None
    return validate(model, values, source=str(path))


def validate(
    model: type[ModelT], values: dict[str, Any], source: str, names: Mapping[str, str] = {}
) -> ModelT:
    """Build `model` from `values`.

    Args:
        source: file, option or command that the values come from; it begins an error's line.
        names: what the source calls its keys, where that differs: `{"seed": "--seed"}`.

    Raises:
        ConfigError: an unknown key, or a value that is against the model's rules.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(model, error, names)}") from None


def _read_yaml_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot read {path}: {reason}; name an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise ConfigError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold a mapping of keys to values, got {type(values).__name__}"
        )
    return values


def _set_dotted(values: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {'.'.join(keys)!r}: {parent!r} is not a section")
        values = child
    values[last] = value


def _explain(model: type[BaseModel], error: ValidationError, names: Mapping[str, str]) -> str:
    """The first problem, in one line, with the nearest known name where a key is unknown."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = (
            f"Did you mean {nearest[0]!r}?"
            if nearest
            else f"Known keys: {', '.join(sorted(known))}."
        )
        return f"unknown key {key!r}. {hint}"
    if problem["type"] == "missing":
        return f"missing key {key!r}; set it in the file or with {key}=VALUE"
    where = f"{names.get(key, key)}={problem['input']!r}: " if key else ""
    return where + " ".join(problem["msg"].removeprefix("Value error, ").split())


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model in `Section`, `Section | None`, `list[Section]` or `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)
