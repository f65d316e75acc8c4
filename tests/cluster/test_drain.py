"""The script `drain` of the images, with stand-ins for Ray and for the list of processes."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from ray.scripts.scripts import cli

DRAIN = Path(__file__).parents[2] / "cluster" / "docker" / "drain"
IDLE = [
    "11 ray::DashboardAgent",
    "12 ray::RuntimeEnvAgent",
    "13 ray::IDLE",
    "14 ray::IDLE_SpillWorker",
]


def drain(folder: Path, seconds: int, processes: str) -> float:
    """Run the script; returns the seconds it took."""
    for name, body in {"ray": 'printf "%s\\n" "$@" >told', "pgrep": processes}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    began_s = time.monotonic()
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run([DRAIN, str(seconds)], cwd=folder, env=os.environ | {"PATH": path}, check=True)
    return time.monotonic() - began_s


@pytest.mark.parametrize("processes", ["exit 1", f"printf '%s\\n' {' '.join(map(repr, IDLE))}"])
def test_an_idle_node_goes_at_once(tmp_path: Path, processes: str) -> None:
    assert drain(tmp_path, 30, processes) < 10
    name, *arguments = (tmp_path / "told").read_text().splitlines()
    told = cli.commands[name].make_context(name, arguments).params
    assert told["deadline_remaining_seconds"] == 30
    assert told["node_id"] is None  # this node


def test_it_waits_for_work_until_it_has_ended(tmp_path: Path) -> None:
    work = f"[[ -e waited ]] || echo 15 ray::EngineReplica; touch waited; echo {IDLE[0]!r}"
    assert 1 <= drain(tmp_path, 30, work) < 10


def test_it_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    assert 1 <= drain(tmp_path, 1, "echo 15 ray::TrainWorker") < 10
