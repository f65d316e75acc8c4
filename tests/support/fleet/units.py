"""Whether systemd understands a unit, and Ray the command in it."""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ray.scripts.scripts import cli

from flashvl.entrypoint import ENVIRONMENT


def read_variables(path: Path) -> dict[str, str]:
    """The variables of a file for `EnvironmentFile`."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def check_unit(path: Path) -> list[str]:
    """What is wrong with a unit beside its `ray.env`."""
    text = path.read_text()
    variables = read_variables(path.with_name("ray.env"))
    (command,) = re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
    unknown = set(re.findall(r"\$\{?(\w+)", command)) - variables.keys()
    wrong = [f"ray.env has no {name}" for name in sorted(unknown)]
    words = [re.sub(r"\$\{?\w+\}?", "1.2.3.4:1", word) for word in shlex.split(command)]
    name, *arguments = [word for word in words[1:] if word != "1.2.3.4:1"]
    options = cli.commands[name].make_context(name, arguments).params
    if not options["block"]:
        wrong.append("systemd would not know when Ray ends")
    if options["head"] and options["num_cpus"] != 0:
        wrong.append("the head has CPUs, and would run drivers and replicas")
    if options["head"] and "RAY_gcs_storage" not in variables:
        wrong.append("the cluster does not survive its head")
    if "Restart=always" not in text:
        wrong.append("nothing brings a lost machine back")
    if variables.get("RAY_AUTH_MODE") != "token" or variables.get("RAY_AUTH_TOKEN"):
        wrong.append("asks for no token, or for one that everybody knows")
    wrong += [f"{key} is not set" for key in ENVIRONMENT if variables.get(key) != ENVIRONMENT[key]]
    return wrong + _verify(path)


def _verify(path: Path) -> list[str]:
    """What systemd's own check says, where it is installed."""
    if shutil.which("systemd-analyze") is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        here = path.read_text().replace("/opt/flashvl/.venv/bin/ray", sys.executable)
        copy.write_text(here)
        line = ["systemd-analyze", "verify", "--man=no", str(copy)]
        told = subprocess.run(line, stderr=subprocess.PIPE, text=True, check=False).stderr
    return [line for line in told.splitlines() if path.name in line]
