"""The architecture holds: floors, light imports, and pinned dependencies."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def modules_loaded_by(statement: str, *, among: set[str]) -> set[str]:
    """Run `statement` in a new Python; which of the top-level modules `among` has it imported?"""
    code = f"import sys\n{statement}\nprint('loaded:', *sorted({among!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_imports_keep_to_the_floors() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert f"{len(linter['contracts'])} kept, 0 broken" in done.stdout


def test_contributing_names_the_floors_that_the_linter_holds() -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [
        {part for part in re.findall(r"\w+", layer) if part != "__main__"}
        for layer in linter["contracts"][0]["layers"]
    ]
    floors = [layer for layer in layers if layer]
    # What starts a command shares the top floor of the table, and a linter's layer each.
    floors = [floors[0] | floors[1], *floors[2:-2], floors[-2] | floors[-1]]
    table = re.findall(
        r"^\| (\d) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    named = [set(re.findall(r"`(\w+)`", parts)) for _, parts in table]
    assert named == floors
    assert [int(number) for number, _ in table] == list(range(len(floors), 0, -1))


def test_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = {"torch", "ray", "transformers", "deepspeed", "trl", "peft", "matplotlib", "pyarrow"}
    assert modules_loaded_by("import flashvl.cli", among=heavy) == set()


@pytest.mark.long
def test_the_low_floors_work_without_ray() -> None:
    # A None in sys.modules makes `import ray` fail, as on a machine where Ray is not installed.
    modules = "flashvl.errors, flashvl.config, flashvl.progress, flashvl.model, flashvl.engine"
    block = f"sys.modules['ray'] = None\nimport {modules}\ndel sys.modules['ray']"
    assert modules_loaded_by(block, among={"ray", "torch"}) <= {"torch"}


def test_modules_loaded_by_sees_what_is_imported() -> None:
    assert modules_loaded_by("import json", among={"json", "torch"}) == {"json"}


def test_every_dependency_is_pinned_to_a_version_that_it_admits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator, f"constraints.txt: {line!r} pins no version"
            assert "+" not in version, f"constraints.txt: {line!r} names one build of a version"
            pinned[canonicalize_name(name)] = version

    for requirement in map(Requirement, named):
        if requirement.name == "flashvl":  # one extra that brings another
            continue
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no line in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"
