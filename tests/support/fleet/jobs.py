"""Whether Ray and flashvl understand the lines that submit jobs."""

import ast
import re
import shlex
from pathlib import Path

import typer
from ray.dashboard.modules.job.cli import submit
from ray.dashboard.modules.job.common import JobSubmitRequest

from flashvl.cli import app
from flashvl.train.pipeline import load_pipeline
from flashvl.train.recipe import load_recipe
from tests.support.kustomize import Resource

ROOT = Path(__file__).parents[3]
IMAGE_ROOT = "/opt/flashvl/"
"""Folder of the images that holds ray_jobs/."""
COMMANDS = {
    "caption": ["caption"],
    "contamination": ["eval", "contamination"],
    "evaluate": ["eval", "run"],
    "prepare": ["data", "convert"],
}
"""Commands of flashvl that the scripts in ray_jobs/ run."""
LINE = re.compile(r"^ *(?:- )?(ray job submit .*?)(?<!\\)$", re.MULTILINE | re.DOTALL)


def check_job(job: Resource, clusters: set[str]) -> list[str]:
    """What is wrong with a RayJob for one of these clusters."""
    spec = job["spec"]
    request = JobSubmitRequest(
        entrypoint=spec["entrypoint"], entrypoint_num_cpus=spec.get("entrypointNumCpus")
    )
    wrong = []
    if not request.entrypoint_num_cpus:
        wrong.append("its driver runs on the head, and dies with it")
    if spec["submissionMode"] != "HTTPMode":
        wrong.append("needs a pod that submits it, which the namespace refuses")
    if spec["clusterSelector"].get("ray.io/cluster") not in clusters:
        wrong.append(f"no cluster {spec['clusterSelector']}")
    python, script, *arguments = shlex.split(request.entrypoint)
    for path in (script, *(each for each in arguments if each.endswith(".yaml"))):
        if not path.startswith(IMAGE_ROOT):
            wrong.append(f"{path} is not in the images")
    here = [each.replace(IMAGE_ROOT, f"{ROOT}/") for each in (script, *arguments)]
    return wrong + check_command([python, *here])


def submit_lines(path: Path) -> list[str]:
    """The lines of a page, or of a module's docstring, that submit jobs by a command."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    lines = LINE.findall(text.replace("`", "\n"))
    return [line.replace("\\\n", " ") for line in lines if " -- " in line]


def check_submit_line(line: str) -> list[str]:
    context = submit.make_context("submit", shlex.split(line, comments=True)[3:])
    wrong = []
    if not context.params["entrypoint_num_cpus"]:
        wrong.append(f"its driver runs on the head, and dies with it: {line}")
    return wrong + check_command(list(context.params["entrypoint"]))


def check_command(command: list[str]) -> list[str]:
    """What is wrong with the command that runs one of the scripts in ray_jobs/."""
    python, script, *arguments = command
    path = ROOT / script
    if python != "python" or not path.is_file():
        return [f"{python} {script} is not there"]
    if path.stem == "train":
        load_recipe(ROOT / arguments[0], arguments[1:])
    elif path.stem == "pipeline":
        load_pipeline(ROOT / arguments[0], arguments[1:])
    else:
        command_line = typer.main.get_command(app)
        for name in COMMANDS[path.stem]:
            command_line = command_line.commands[name]
        command_line.make_context(path.stem, arguments)
    return []
