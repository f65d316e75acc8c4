"""Whether the Dockerfile finds what it copies and installs."""

import re
import tomllib
from pathlib import Path

from flashvl.entrypoint import ENVIRONMENT

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "cluster" / "docker" / "Dockerfile"


def targets(path: Path = DOCKERFILE) -> set[str]:
    """Names of the images: the stages that end as another user than root."""
    stages = re.split(r"^FROM ", path.read_text(), flags=re.MULTILINE)[1:]
    return {
        name.group(1)
        for stage in stages
        if re.search(r"^USER ", stage, re.MULTILINE)
        and (name := re.match(r"\S+ AS (\S+)", stage)) is not None
    }


def check_images(path: Path) -> list[str]:
    text = path.read_text().replace("\\\n", " ")
    stages = {
        name: (base, body)
        for base, name, body in re.findall(
            r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL
        )
    }
    wrong = []
    if named := set(re.findall(r"--target (\S+)", text)) ^ targets(path):
        wrong.append(f"{sorted(named)} are not both built and documented")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ignore = (path.parent / f"{path.name}.dockerignore").read_text().splitlines()
    for name, (base, body) in stages.items():
        if base not in stages and ":" not in base:
            wrong.append(f"{name} begins with {base}, which is no stage and has no version")
        for source in re.findall(r"^COPY (.+) \S+$", body, re.MULTILINE):
            for each in source.split():
                if not (ROOT / each).exists():
                    wrong.append(f"{each} does not exist")
                if f"!{each}" not in ignore:
                    wrong.append(f"{each} is not sent to Docker")
        for extras in re.findall(r"'\.\[(.*?)\]'", body):
            if unknown := set(extras.split(",")) - project["optional-dependencies"].keys():
                wrong.append(f"{sorted(unknown)} are no extras")
        for line in re.findall(r"pip install [^&\n]*", body):
            if "--constraint constraints.txt" not in line and "--no-deps" not in line:
                wrong.append(f"not pinned: {line}")
        users = re.findall(r"^USER (\S+)$", body, re.MULTILINE)
        if users and users != ["1000"]:
            wrong.append(f"{name} runs as {users}")
    told = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", text, re.MULTILINE))))
    wrong += [f"{key} is not set" for key, value in ENVIRONMENT.items() if told.get(key) != value]
    return wrong
