"""The service as other projects' client libraries use it: `clients/` has a script for each.

The libraries are installed into an environment of their own (`make_environment`).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashvl.data import synthetic
from tests.support.images import encode

CLIENTS = Path(__file__).parent / "clients"
PACKAGES = ("openai", "langchain-openai", "litellm", "pydantic-ai", "instructor", "requests")
NODE_PACKAGES = ("ai", "@ai-sdk/openai-compatible", "zod")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def python(make_environment: Callable[..., Path]) -> Path:
    """The Python of an environment with the libraries."""
    return make_environment(*PACKAGES)


@pytest.fixture(scope="module")
def node_modules(python: Path) -> Path:
    """The folder of an environment with the libraries for Node."""
    environment = python.parent.parent
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm (Debian: apt install nodejs npm)")
    if not (environment / "node_modules" / "ai").exists():
        install = ["npm", "install", "--silent", "--prefix", environment, *NODE_PACKAGES]
        subprocess.run(install, check=True, timeout=600)
    return environment


@pytest.fixture(scope="module")
def scene() -> synthetic.Sample:
    return synthetic.sample("heldout", 1, 1, tasks=("caption", "count"))


@pytest.fixture
def picture(scene: synthetic.Sample, tmp_path: Path) -> Path:
    file = tmp_path / "scene.png"
    file.write_bytes(encode(scene.image()))
    return file


def run(*line: str | Path) -> dict[str, Any]:
    # LiteLLM would look for its table of prices on the network.
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(told: dict[str, Any], scene: synthetic.Sample) -> None:
    """The model's own answers are exact; those of a prescribed shape have that shape."""
    assert told["image"] == told["stream"] == scene.turns[0].answer
    assert told["turns"] == "2"
    assert told["tools"]["name"] == "report"
    for shaped in (told["structured"], told["tools"]["arguments"]):
        assert set(shaped) == {"num_shapes", "color", "is_chart"}
        assert shaped["num_shapes"] in range(10) and isinstance(shaped["is_chart"], bool)
        assert shaped["color"] in ("red", "green", "blue")


@pytest.mark.parametrize("client", sorted(file.stem for file in CLIENTS.glob("*_client.py")))
def test_python_clients(
    client: str, python: Path, url: str, picture: Path, scene: synthetic.Sample
) -> None:
    told = run(python, CLIENTS / f"{client}.py", url, picture)
    sys.stderr.write(f"{client}: {told}\n")
    check(told, scene)


def test_ai_sdk(node_modules: Path, url: str, picture: Path, scene: synthetic.Sample) -> None:
    check(run("node", CLIENTS / "ai_sdk_client.mjs", url, picture, node_modules), scene)
