"""Options of the commands: those made from a configuration's fields, and those that several share.

A field is documented once, in its model. `options_from` gives a command the option for it, so that
its name, type, default and help are the model's.
"""

import functools
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from flashvl.config import StrictModel, validate

ModelOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|FOLDER",
        help="Shipped model's name (tiny), Flash-VL folder, or published FlashVL/* name or folder.",
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="JSON file to write the figures to.")
]

Command = Callable[..., None]
ModelT = TypeVar("ModelT", bound=StrictModel)


METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
"""Names of values in the help, where the command gives no better one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldOption:
    """A configuration's field as an option."""

    path: tuple[str, ...]
    """Names of the sections around the field, the outermost first, and its own."""
    field: FieldInfo
    default: Any
    kind: Any
    """The type of the value, or of one value of a tuple's."""
    least: float | None
    greatest: float | None
    """Bounds of a number; the model alone knows those that a value must not equal."""

    @property
    def is_repeated(self) -> bool:
        """Whether the field is a tuple, of which each use of the option gives one value."""
        return get_origin(self.field.annotation) is tuple

    @property
    def flag(self) -> str:
        """The option as it is typed: `--media-host` for the field `media_hosts`."""
        name = self.path[-1].removesuffix("s") if self.is_repeated else self.path[-1]
        return f"--{name.replace('_', '-')}"


def field_options(
    model: type[StrictModel], default: StrictModel | None = None
) -> Iterator[FieldOption]:
    """A model's fields as options; those of its sections stand in place of a section.

    Args:
        default: a section's values, where the model around it has its own.
    """
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        value = field.get_default() if default is None else getattr(default, name)
        if isinstance(value, StrictModel):
            for inner in field_options(type(value), value):
                yield replace(inner, path=(name, *inner.path))
            continue
        kind: Any = field.annotation
        if get_origin(kind) not in (None, Literal):  # `Kind | None` or `tuple[Kind, ...]`
            kind = get_args(kind)[0]
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        schema = schemas[name].get("anyOf", [schemas[name]])[0]
        least = schema.get("minimum")
        if kind is int and "exclusiveMinimum" in schema:
            least = schema["exclusiveMinimum"] + 1
        yield FieldOption(
            path=(name,),
            field=field,
            default=value,
            kind=kind,
            least=least,
            greatest=schema.get("maximum"),
        )


def options_from(
    model: type[StrictModel], *, arguments: tuple[str, ...] = (), metavars: Mapping[str, str] = {}
) -> Callable[[Command], Command]:
    """Give a command an option for each field of `model`, in the fields' order.

    The command takes the values as `**options`, ready for `build`. A parameter that it declares
    itself stands in place of the option of the same name.

    Args:
        arguments: fields that are given by their place on the command line.
        metavars: what the help shows for a field's value, where the type's name says too little.
    """
    options = {option.path[-1]: option for option in field_options(model)}

    def decorate(command: Command) -> Command:
        own = {
            name: parameter
            for name, parameter in inspect.signature(command).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        }
        parameters = [
            own.get(name) or _parameter(option, options, name in arguments, metavars.get(name))
            for name, option in options.items()
        ]
        parameters += [parameter for name, parameter in own.items() if name not in options]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            collected: dict[str, Any] = {name: values.pop(name) for name in own}
            for name, value in values.items():
                *sections, last = options[name].path
                place = collected
                for section in sections:
                    place = place.setdefault(section, {})
                place[last] = value
            command(**collected)

        with_options.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        )
        with_options.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_options

    return decorate


def build(model: type[ModelT], options: dict[str, Any], command: str) -> ModelT:
    """The configuration that a command's options describe.

    Raises:
        ConfigError: an option's value is against the model's rules; the error names the option.
    """
    names = {".".join(option.path): option.flag for option in field_options(model)}
    return validate(model, options, source=command, names=names)


def _parameter(
    option: FieldOption,
    options: Mapping[str, FieldOption],
    is_argument: bool,
    metavar: str | None,
) -> inspect.Parameter:
    kind, default = option.kind, option.default
    help_text = _as_help(option.field.description or "", options)
    if option.is_repeated:
        kind = types.GenericAlias(list, (kind,))
        default = default if option.field.is_required() else list(default)
        help_text = f"{help_text} May be repeated."
    elif default is None:
        kind |= None
    metavar = metavar or METAVARS.get(option.kind)
    if is_argument:
        info: Any = typer.Argument(metavar=metavar, help=help_text)
    else:
        # Typer itself names a flag that is true by default, and its negative.
        names = () if default is True else (option.flag,)
        info = typer.Option(
            *names, metavar=metavar, help=help_text, min=option.least, max=option.greatest
        )
    return inspect.Parameter(
        option.path[-1],
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.field.is_required() else default,
        annotation=Annotated[kind, info],
    )


def _as_help(docstring: str, options: Mapping[str, FieldOption]) -> str:
    """A field's docstring as one line, where fields are named as the options that they are."""

    def plain(quoted: re.Match[str]) -> str:
        name = quoted.group(1)
        return options[name].flag if name in options else name

    return re.sub(r"`([^`]+)`", plain, " ".join(docstring.split()))


def write_json(path: Path, value: Any) -> None:
    """Write the file of `--json`; called with `{}` before a long run, it finds a bad path early.

    Raises:
        ConfigError: the file cannot be written.
    """
    from flashvl.errors import ConfigError

    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--json {path} cannot be written: {error.strerror}; name another file"
        ) from None
