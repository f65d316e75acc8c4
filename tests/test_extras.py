"""`pip install flashvl` brings the model and the engine; each command names the extra it lacks."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flashvl.entrypoint import extra_that_brings

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("ray", "ray"),
        ("ray.data", "ray"),
        ("ray.serve", "serve"),
        ("ray.train", "train"),
        ("fsspec.core", "ray"),
        ("fastapi", "serve"),
        ("grpc", "serve"),
        ("multipart", "serve"),
        ("deepspeed", "train"),
        ("psutil", "bench"),
        ("pillow_heif", "heif"),
        ("torch", None),
        ("no_such_module", None),
    ],
)
def test_a_module_belongs_to_the_extra_that_installs_it(module: str, extra: str | None) -> None:
    assert extra_that_brings(module) == extra


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["caption", "in.parquet", "--output", "out"], "ray", "ray"),
        (["train", "ray_jobs/configs/static/stage1.yaml"], "ray", "ray"),
        pytest.param(["serve"], "fastapi", "serve", marks=pytest.mark.long),
        (["bench", "serve"], "psutil", "bench"),
        (["bench", "peers", "--plot", "peers.png"], "matplotlib", "bench"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(
    arguments: list[str], missing: str, extra: str
) -> None:
    # A None in sys.modules makes the import fail, as where the library is not installed.
    code = f"import sys; sys.modules[{missing!r}] = None; from flashvl.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert f"pip install 'flashvl[{extra}]'" in done.stderr


DISTRIBUTIONS = {
    "PIL": "pillow",
    "pydantic_core": "pydantic",
    "tokenizers": "transformers",
    "yaml": "pyyaml",
}
"""What brings a module that is not called as its distribution."""
ELSEWHERE = {"lmms_eval", "tqdm", "vllm", "vlmeval"}
"""Libraries that only scripts and adapters for other environments import."""


def test_every_library_that_is_imported_is_a_dependency_or_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    unknown = set()
    for path in (ROOT / "flashvl").rglob("*.py"):
        for module in imported_by(path) - set(sys.stdlib_module_names) - {"flashvl"} - ELSEWHERE:
            distribution = canonicalize_name(DISTRIBUTIONS.get(module, module))
            if distribution not in base and extra_that_brings(module) is None:
                unknown.add((module, path.name))
    assert unknown == set()


def imported_by(path: Path) -> set[str]:
    """The top-level names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found
