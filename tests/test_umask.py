"""What the commands write may be read by whom the umask lets read, down to the last report."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

RECIPE = Path(__file__).parent.parent / "ray_jobs" / "configs" / "tiny" / "stage1.yaml"


def run(*arguments: str | Path) -> None:
    """A command with a Ray of its own, whose workers have our umask."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "flashvl", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.slow
def test_every_command_obeys_the_umask(
    tmp_path: Path, assert_obeys_umask: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    run("tiles", tmp_path / "red.png", "--output", out / "tiles.png", "--json", out / "tiles.json")
    run("eval", "scenes", "--items", "1", "--json", out / "scores.json")
    run("demo", "--output", out / "demo")  # captions and their report among it
    settings = ["num_workers=1", "global_batch_size=4"]
    data = ["data.synthetic.count=8", "warmup_steps=1"]
    run("train", RECIPE, "init_from=tiny", f"output_dir={out / 'train'}", *settings, *data)
    assert (out / "train" / "model.safetensors").is_file()
    assert_obeys_umask(out)
