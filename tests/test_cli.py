"""The command line: help, JSON, and one line for every mistake of a user."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashvl.cli import app
from flashvl.data import synthetic

ROOT = Path(__file__).resolve().parents[1]
STAGE1 = str(ROOT / "ray_jobs" / "configs" / "static" / "stage1.yaml")

runner = CliRunner()


def refused(*arguments: str) -> str:
    """Run a command that must fail: exit status 2, one line on stderr, which is returned."""
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line, *rest = result.stderr.splitlines()
    assert not rest
    assert line.startswith("error: ")
    return line


def test_models_prints_the_counts_of_the_full_size_preset() -> None:
    counts = json.loads(runner.invoke(app, ["models", "--json"]).stdout)["static"]
    assert counts["multi_modal_projector"] == 95_445_504
    assert counts["vision_tower"] == 413_534_448
    assert counts["language_model"] == 1_543_714_304
    assert counts["total"] == 95_445_504 + 413_534_448 + 1_543_714_304


@pytest.mark.parametrize(
    "command",
    [[], ["caption"], ["train"], ["eval", "scenes"], ["demo"], ["import"], ["assemble"], ["chat"]],
)
def test_help_explains(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    line = refused("caption", "/no/such/table.parquet", "--output", str(tmp_path / "out"))
    assert "/no/such/table.parquet" in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    line = refused("eval", "scenes", "--model", "tinny")
    assert "tinny" in line
    assert "shipped model (tiny" in line


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    line = refused("eval", "scenes", "--model", str(tmp_path))
    assert "holds a 'llava' model, not 'flashvl'" in line


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "no readable config.json" in refused("eval", "scenes", "--model", str(tmp_path))


def test_a_chat_answers_line_by_line(tmp_path: Path) -> None:
    """Answers are about the picture and about what was said before."""
    drawn = synthetic.sample("heldout", 0, 3, tasks=("chart",))
    picture = tmp_path / "chart.png"
    drawn.image().save(picture)
    questions = [turn.question for turn in drawn.turns if turn.task == "chart"]
    result = runner.invoke(app, ["chat", str(picture)], input="\n\n".join(questions))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        turn.answer for turn in drawn.turns if turn.task == "chart"
    ]


def test_a_chat_about_nothing_is_refused() -> None:
    assert "/no/picture.png" in refused("chat", "/no/picture.png")


def test_an_import_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    line = refused("import", str(tmp_path), "--output", str(tmp_path / "out"))
    assert "holds a 'llava' model, not a published one" in line


def test_an_import_over_a_folder_is_refused(tmp_path: Path) -> None:
    assert "exists" in refused("import", str(tmp_path), "--output", str(tmp_path))


def test_parts_that_are_nowhere_are_named(tmp_path: Path) -> None:
    arguments = ["--vision", "/no/tower", "--llm", "/no/llm", "--output", str(tmp_path / "out")]
    assert "no folder '/no/tower'" in refused("assemble", *arguments)


def test_parts_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    arguments = ["--vision", str(tmp_path), "--llm", str(tmp_path), "--output", "/no/out"]
    assert "holds a 'llava' model, not a vision tower" in refused("assemble", *arguments)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "offline", "reason"),
    [
        (["import", "--output", "/no/out"], {}, ""),
        (["import", "--output", "/no/out"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (["eval", "scenes", "--model"], {}, "HF_HUB_OFFLINE is set"),
    ],
    ids=["import", "import, switched off", "--model"],
)
def test_a_published_model_that_cannot_be_downloaded(
    tmp_path: Path, arguments: list[str], offline: dict[str, str], reason: str
) -> None:
    """`import` asks the hub unless that is switched off; --model never does by itself."""
    name = "FlashVL/FlashVL-2B-Static"
    inherited = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    out_of_reach = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [Path(sys.executable).with_name("flashvl"), *arguments, name],
        env=inherited | out_of_reach | offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {name} is no folder here and cannot be downloaded ({reason}")
    assert f"run `hf download {name} --local-dir DIR`" in line
    assert ("HF_HUB_OFFLINE" in line) == bool(reason)


def test_scores_that_cannot_be_written_are_refused() -> None:
    line = refused("eval", "scenes", "--items", "1", "--json", "/proc/no/scores.json")
    assert "/proc/no/scores.json" in line


def test_a_bad_recipe_key_is_named_with_its_nearest() -> None:
    line = refused("train", STAGE1, "learing_rate=1e-4")
    assert "unknown key 'learing_rate'. Did you mean 'learning_rate'?" in line


def test_a_recipe_that_is_not_there_is_named() -> None:
    assert "/no/recipe.yaml" in refused("train", "/no/recipe.yaml")


@pytest.mark.long
def test_an_entry_point_prints_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "ray_jobs/train.py", STAGE1, "learing_rate=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
