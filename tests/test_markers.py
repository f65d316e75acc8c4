"""A test that is not marked `ray` cannot start Ray, so that `make test-fast` starts none."""

import os
import subprocess
import sys

import pytest

INIT = "import ray; ray.init()"
CLUSTER = "from ray.cluster_utils import Cluster; Cluster(initialize_head=True)"
CAPTION = "from flashvl.entrypoint import start_ray; start_ray()"


@pytest.mark.parametrize("code", [INIT, CLUSTER, CAPTION])
def test_ray_cannot_be_started(code: str) -> None:
    with pytest.raises(NotADirectoryError, match="only tests with the fixture starts_ray"):
        exec(code, {})


def test_nor_by_a_command() -> None:
    done = subprocess.run([sys.executable, "-c", INIT], capture_output=True, text=True)
    assert done.returncode == 1
    assert "only tests with the fixture starts_ray" in done.stderr


@pytest.mark.usefixtures("starts_ray")
def test_the_fixture_marks_and_permits(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("ray") is not None
    assert "starts_ray" not in os.environ.get("RAY_TMPDIR", "")
