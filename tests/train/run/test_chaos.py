"""A stage whose processes are killed at random, twenty times, at three, two and four workers."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from flashvl.train.run.export import read_log
from tests.support.cluster import AGENTS
from tests.support.stages import assert_every_row_once

NUM_STEPS, GLOBAL_BATCH = 300, 8
NUM_ROWS = NUM_STEPS * GLOBAL_BATCH - 3
"""The last step is smaller."""
KILLS = {3: 12, 2: 3, 4: 5}
"""Kills at each number of workers, in this order; each of the two changes is a kill, too."""
UNDER_WAY_S = 600.0

DRIVER = """
import sys
from flashvl.entrypoint import report_errors, start_ray
with report_errors():
    from flashvl.train.recipe import load_recipe
    from flashvl.train.run.launch import run
    start_ray(num_cpus=6)
    result = run(
        load_recipe(sys.argv[1], sys.argv[2:]),
        lambda done, total, note="": print("step", done, flush=True),
    )
    print(result)
"""


@dataclass
class Run:
    """A command that trains; started again whenever it is not running."""

    recipe: Path
    output: Path
    log: Path
    num_workers: int = 3
    process: subprocess.Popen[bytes] | None = None
    killed: list[str] = field(default_factory=list)

    def start(self) -> None:
        command = [sys.executable, "-c", DRIVER, str(self.recipe)]
        overrides = [f"output_dir={self.output}", f"num_workers={self.num_workers}"]
        self.process = subprocess.Popen(
            [*command, *overrides], stdout=self.log.open("ab"), stderr=subprocess.STDOUT
        )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def last_step(self) -> int:
        steps = re.findall(rb"^step (\d+)", self.log.read_bytes(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def num_lines(self) -> int:
        return len(re.findall(rb"^step ", self.log.read_bytes(), re.MULTILINE))

    def wait_for_progress(self) -> None:
        """Wait until another step is told."""
        before, deadline_s = self.num_lines(), time.monotonic() + UNDER_WAY_S
        while self.num_lines() == before:
            assert self.is_running, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline_s, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def kill_one(self, draw: random.Random) -> None:
        """Kill -9 a process of the run: the driver, a worker, what controls or feeds them."""
        assert self.process is not None
        driver = psutil.Process(self.process.pid)
        processes = {"driver": [driver]}
        for process in driver.children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue  # it ended meanwhile
            if title.startswith("ray::") and not title.startswith((*AGENTS, "ray::IDLE")):
                processes.setdefault(title.split()[0].partition(".")[0], []).append(process)
        name = draw.choice(sorted(processes))
        if name == "driver":
            self.kill_driver()
        else:
            draw.choice(processes[name]).kill()
            self.killed.append(name)

    def kill_driver(self) -> None:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        alive, deadline_s = children, time.monotonic() + 60
        while alive and time.monotonic() < deadline_s:
            for process in alive:  # Ray leaves its own agents behind
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.name().startswith(AGENTS):
                        process.kill()
            _, alive = psutil.wait_procs(alive, timeout=1)
        assert not alive, alive
        self.killed.append("driver")


@pytest.fixture
def recipe(tiny_random: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "kind": "supervised",
                "stage": "test",
                "init_from": str(tiny_random),
                "output_dir": "given",
                "data": {"synthetic": {"count": NUM_ROWS, "seed": 5}},
                "trainable": ["multi_modal_projector"],
                "global_batch_size": GLOBAL_BATCH,
                "token_budget": 1000,
                "max_length": 1000,
                "use_gpu": False,
                "precision": "fp32",
                "learning_rate": 1e-4,
                "warmup_steps": 10,
                "save_steps": 5,
                "max_failures": 100,
            }
        )
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_lose_no_row_and_use_none_twice(
    starts_ray: None, recipe: Path, tmp_path: Path
) -> None:
    draw = random.Random(int(os.environ.get("FLASHVL_CHAOS_SEED", "0")))
    run = Run(recipe, tmp_path / "disturbed", tmp_path / "disturbed.log")
    first_change = NUM_STEPS
    start_s = time.monotonic()
    for num_workers, count in KILLS.items():
        if run.num_workers != num_workers:
            first_change = min(first_change, run.last_step())
            run.kill_driver()
            run.num_workers = num_workers
        for _ in range(count):
            if not run.is_running:
                run.start()
            if draw.random() < 0.5:
                run.wait_for_progress()
                time.sleep(draw.uniform(0, 4))
            else:
                time.sleep(draw.uniform(1, 15))  # perhaps while it starts
            assert run.is_running, run.log.read_text()[-3000:]
            run.kill_one(draw)
            run.process.poll() if run.process else None
    if not run.is_running:
        run.start()
    run.wait_for_progress()
    assert run.process is not None
    assert run.process.wait() == 0, run.log.read_text()[-3000:]
    disturbed_s = time.monotonic() - start_s
    assert len(run.killed) >= 20

    assert_every_row_once(run.output, NUM_STEPS, NUM_ROWS)

    undisturbed = Run(recipe, tmp_path / "undisturbed", tmp_path / "undisturbed.log")
    start_s = time.monotonic()
    undisturbed.start()
    assert undisturbed.process is not None
    assert undisturbed.process.wait() == 0, undisturbed.log.read_text()[-3000:]
    undisturbed_s = time.monotonic() - start_s
    differences = [
        abs(one["loss"] - other["loss"])
        for one, other in zip(read_log(run.output), read_log(undisturbed.output), strict=True)
    ]
    figures = {
        "killed": run.killed,
        "first change of workers at step": first_change,
        "largest difference before": max(differences[:first_change]),
        "largest difference in all": max(differences),
        "seconds": [disturbed_s, undisturbed_s],
    }
    print(json.dumps(figures))  # noqa: T201
    assert first_change > 20, figures
    assert max(differences[:first_change]) < 1e-5, figures
    assert max(differences) < 1e-2, figures
