"""Whether `ray up` understands its files, and Ray the commands in them."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import botocore.session
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

from tests.support.fleet.images import targets

ROOT = Path(__file__).parents[3]


def check_launcher(path: Path) -> list[str]:
    told = yaml.safe_load(path.read_text())
    config = prepare_config(told)
    validate_config(config)
    wrong = _check_images(config) + _check_auth(config)
    starts = {
        name: _ray_commands(config[f"{name}_start_ray_commands"]) for name in ("head", "worker")
    }
    if starts["head"][-1].get("num_cpus") != 0:
        wrong.append("the head has CPUs, and would run drivers and replicas")
    if not any("RAY_gcs_storage=rocksdb" in each for each in config["head_start_ray_commands"]):
        wrong.append("the cluster does not survive its head")
    if config["provider"]["type"] == "local":
        return wrong
    gpus = config["available_node_types"]["a100"]
    if (gpus["max_workers"], gpus["resources"]["GPU"]) != (5, 8):
        wrong.append("not five nodes of eight GPUs")
    most = sum(each["max_workers"] for each in config["available_node_types"].values())
    if most != config["max_workers"]:
        wrong.append(f"max_workers is {config['max_workers']}, but the groups' are {most}")
    if config["provider"]["type"] == "aws":
        wrong += _check_aws(config)
    return wrong


def _ray_commands(lines: list[str]) -> list[dict[str, Any]]:
    """The options of each command, as Ray's own command line reads them."""
    parsed = []
    for line in lines:
        words = shlex.split(line)
        ray, name, *arguments = words[words.index("ray") :]
        parsed.append(cli.commands[name].make_context(name, arguments).params)
    return parsed


def _check_images(config: dict[str, Any]) -> list[str]:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    docker = [config["docker"]]
    docker += [each.get("docker", {}) for each in config["available_node_types"].values()]
    names = [value for each in docker for key, value in each.items() if key.endswith("image")]
    known = {f"registry.example.com/flashvl-{target}:{version}" for target in targets()}
    return [f"the Dockerfile makes no {name}" for name in names if name not in known]


def _check_auth(config: dict[str, Any]) -> list[str]:
    wrong = []
    if "--env RAY_AUTH_MODE=token" not in config["docker"]["run_options"]:
        wrong.append("asks for no token")
    if not any(each.endswith(".ray/auth_token") for each in config["file_mounts"]):
        wrong.append("the machines get no token")
    allowed = re.compile(r"--(ulimit|env|volume) \S+")
    options = [*config["docker"]["run_options"], *config["docker"]["head_run_options"]]
    return wrong + [f"unknown: {each}" for each in options if not allowed.fullmatch(each)]


def _check_aws(config: dict[str, Any]) -> list[str]:
    """By the model of EC2's API that comes with botocore."""
    ec2 = botocore.session.get_session().get_service_model("ec2")

    def report(operation: str, **parameters: Any) -> str:
        shape = ec2.operation_model(operation).input_shape
        text: str = ParamValidator().validate(parameters, shape).generate_report()
        return text

    reports = [
        report("RunInstances", MinCount=1, MaxCount=1, **each["node_config"])
        for each in config["available_node_types"].values()
    ]
    rules = config["provider"]["security_group"]["IpPermissions"]
    reports.append(report("AuthorizeSecurityGroupIngress", IpPermissions=rules))
    wrong = [each for each in reports if each]
    if any((rule["FromPort"], rule["ToPort"]) != (22, 22) for rule in rules):
        wrong.append("more than SSH comes in")
    return wrong
