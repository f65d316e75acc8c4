"""Options: each has a help that stands by itself, is printed whole, and is as its field has it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flashvl.batch.config import CaptionJob
from flashvl.cli import app
from flashvl.cli.options import field_options
from flashvl.config import StrictModel
from flashvl.data.convert.config import ConversionJob
from flashvl.eval.config import EvaluationJob
from flashvl.eval.contamination.config import ContaminationJob
from flashvl.serve.config import ServiceConfig
from tests.test_words import FRAGMENT, STUMBLES

WIDTH = 80


def commands_of(group: Any, name: str = "flashvl") -> Iterator[tuple[str, Any]]:
    """The group and every command and group below it, each with what is typed."""
    yield name, group
    for child_name, child in getattr(group, "commands", {}).items():
        yield from commands_of(child, f"{name} {child_name}")


COMMANDS = dict(commands_of(typer.main.get_command(app)))
MIRRORED: dict[str, type[StrictModel]] = {
    "flashvl caption": CaptionJob,
    "flashvl serve": ServiceConfig,
    "flashvl data convert": ConversionJob,
    "flashvl eval run": EvaluationJob,
    "flashvl eval contamination": ContaminationJob,
}


def printed(name: str) -> str:
    """What `--help` prints on a terminal of `WIDTH` columns."""
    result = CliRunner().invoke(app, [*name.split()[1:], "--help"], terminal_width=WIDTH)
    assert result.exit_code == 0, result.output
    return result.stdout


def joined(text: str) -> str:
    """The text without what wrapping changes: white space, after hyphens, too."""
    return re.sub(r"\s", "", text)


def helps_of(command: Any) -> dict[str, str]:
    """The help of a command and of each of its options and arguments."""
    helps = {each.name: each.help or "" for each in command.params}
    return {"": command.help or "", **helps}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_stands_by_itself(name: str) -> None:
    for parameter, text in helps_of(COMMANDS[name]).items():
        assert text.strip(), f"{name} {parameter} has no help"
        assert not FRAGMENT.match(text), f"{name} {parameter}: {text!r}"
        assert not STUMBLES.search(text), f"{name} {parameter}: {text!r}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_is_printed_whole(name: str) -> None:
    page = printed(name)
    assert all(len(line) <= WIDTH for line in page.splitlines())
    assert "..." not in page.partition("Commands:")[2], "the first sentence is cut in the list"
    for parameter, text in helps_of(COMMANDS[name]).items():
        assert joined(text) in joined(page), f"{name} {parameter}"
    examples = [line for line in page.splitlines() if "Example:" in line]
    assert all(line.startswith("  Example: ") for line in examples), examples


@pytest.mark.parametrize(("name", "model"), MIRRORED.items())
def test_every_field_is_reached_with_its_default(name: str, model: type[StrictModel]) -> None:
    parameters = {each.name: each for each in COMMANDS[name].params}
    defaults = {
        (section, key): value
        for key, value in model.model_construct().model_dump().items()
        for section, key, value in (
            [(key, *each) for each in value.items()]
            if isinstance(value, dict)
            else [("", key, value)]
        )
    }
    required = {("", key) for key, field in model.model_fields.items() if field.is_required()}
    for section, key in [*defaults, *required]:
        parameter = parameters[key]
        assert parameter.required == ((section, key) in required), key
        if (section, key) in defaults:
            value = parameter.default
            assert (tuple(value) if isinstance(value, list) else value) == defaults[section, key]
    assert len(list(field_options(model))) == len(defaults | dict.fromkeys(required))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--media-host", "a", "--media-host", "b:1"], {"media_hosts": ("a", "b:1")}),
        (["--no-follow-paths"], {"follow_paths": False}),
        (["--restart"], {"restart": True}),
        (["--max-rows", "3"], {"max_rows": 3}),
        (["--dtype", "float32", "--top-p", "0.5"], {"dtype": "float32", "top_p": 0.5}),
        (["--min-image-side", "7"], {"image_limits": {"min_image_side": 7}}),
    ],
)
def test_what_is_typed_is_what_is_built(
    monkeypatch: pytest.MonkeyPatch, line: list[str], expected: dict[str, Any]
) -> None:
    """Options that are not typed have the model's defaults."""
    built: list[CaptionJob] = []

    def keep(job: CaptionJob) -> None:
        built.append(job)
        raise SystemExit(0)

    monkeypatch.setattr("flashvl.batch.job.check_caption_job", keep)
    CliRunner().invoke(app, ["caption", "in", "--output", "out", *line], catch_exceptions=False)
    assert built == [CaptionJob.model_validate({"input": "in", "output": "out", **expected})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["serve", "--body-timeout-s", "0"], "--body-timeout-s=0.0"),
        (["serve", "--replicas", "3:1"], "--replicas='3:1'"),
        (["serve", "--max-image-side", "0"], "--max-image-side"),
        (["caption", "in", "--output", "out", "--top-p", "0"], "--top-p=0.0"),
        (["caption", "in", "--output", "out", "--prompt", "a <image>"], "--prompt='a <image>'"),
        (["caption", "in", "--output", "hf://datasets/a/b"], "--output='hf://datasets/a/b'"),
        (["caption", "in", "--output", "out", "--max-rows", "0"], "--max-rows"),
    ],
)
def test_a_value_against_the_rules_names_its_option(line: list[str], said: str) -> None:
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert said in result.stderr and "Traceback" not in result.stderr
