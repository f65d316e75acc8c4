"""The script for Slurm, run with stand-ins for Slurm and Ray that note how they are called."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.dashboard.modules.job.cli import submit
from ray.scripts.scripts import cli
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from flashvl.entrypoint import ENVIRONMENT
from tests.support.cluster import wait_until
from tests.support.fleet.jobs import check_command

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "flashvl.sbatch"
COMMAND = ["python", "ray_jobs/train.py", "ray_jobs/configs/static/stage1.yaml", "num_workers=40"]

STAND_INS = {
    # The step: it runs on the first node what comes after its own options.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": '[[ $1 == show ]] && printf "node1\\nnode2\\n" || note scontrol "$@"',
    "ray": """
note ray "$@"
case "$1 $2" in
    "symmetric-run --address")
        [[ -n ${RAY_DOES_NOT_START:-} ]] && exit 0
        printenv >variables
        while [[ $1 != -- ]]; do shift; done
        shift
        "$@" ;;
    "job submit")
        for ((i = 0; i < ${JOB_SECONDS:-0} * 10; i++)); do
            [[ -e stopped ]] && exit 1
            sleep 0.1
        done
        exit "${JOB_STATUS:-0}" ;;
    "job stop") touch stopped ;;
esac
""",
}


@dataclass(kw_only=True)
class Allocation:
    """A folder in which the script runs as Slurm would run it."""

    folder: Path

    def start(self, **environment: str) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "96",
            "SLURM_GPUS_ON_NODE": "8",
        }
        own = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
        return subprocess.Popen(
            ["bash", SCRIPT, *COMMAND], env=own | slurm | environment, text=True
        )

    def calls(self) -> list[list[str]]:
        noted = self.folder / "calls"
        if not noted.exists():
            return []
        return [line.split("\x1f") for line in noted.read_text().split("\x1e") if line]


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    note = 'note() { local IFS=$\'\\x1f\'; printf "%s\\x1e" "$*" >>calls; }'
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{note}\n{body}\n")
        (folder / name).chmod(0o755)
    return Allocation(folder=tmp_path)


def test_ray_understands_what_it_is_told(allocation: Allocation) -> None:
    assert allocation.start().wait(timeout=60) == 0
    variables = (allocation.folder / "variables").read_text().splitlines()
    assert {f"{name}={value}" for name, value in ENVIRONMENT.items()} <= set(variables)
    start, submission = allocation.calls()
    middle = start.index("--")
    options = cli.commands["symmetric-run"].make_context("symmetric-run", start[2:middle]).params
    assert (options["address"], options["min_nodes"]) == ("node1:6379", 2)
    rest = curate_and_validate_ray_start_args(start[2:middle])
    assert cli.commands["start"].make_context("start", rest).params["num_gpus"] == 8

    told = submit.make_context("submit", submission[3:]).params
    assert told["entrypoint_num_cpus"] > 0
    assert list(told["entrypoint"]) == COMMAND
    assert not check_command(COMMAND)


@pytest.mark.parametrize(
    "environment", [{"JOB_STATUS": "1"}, {"RAY_DOES_NOT_START": "yes"}], ids=str
)
def test_a_job_that_does_not_succeed_fails_the_allocation(
    allocation: Allocation, environment: dict[str, str]
) -> None:
    """Also where Ray has not started, although `ray symmetric-run` then ends with 0."""
    assert allocation.start(**environment).wait(timeout=60) != 0


def test_when_the_time_is_over_the_job_stops_and_is_queued_again(allocation: Allocation) -> None:
    process = allocation.start(JOB_SECONDS="60")
    wait_until(lambda: any(call[1:3] == ["job", "submit"] for call in allocation.calls()), 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    *_, submission, stop, requeue = allocation.calls()
    assert stop[1:3] == ["job", "stop"]
    assert stop[-1] == submission[submission.index("--submission-id") + 1]
    assert requeue == ["scontrol", "requeue", "7"]


def test_the_job_is_stopped_before_slurm_kills_it() -> None:
    text = SCRIPT.read_text()
    notice_s = int(text.partition("#SBATCH --signal=B:TERM@")[2].split()[0])
    patience_s = int(text.partition("export RAY_JOB_STOP_WAIT_TIME_S=")[2].split()[0])
    assert patience_s < notice_s


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", SCRIPT], check=True)
