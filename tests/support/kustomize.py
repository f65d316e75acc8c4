"""What `kustomize build` makes of the folders of cluster/kuberay, for machines that lack it.

It knows what they use and refuses the rest; a test compares it with kustomize itself.
"""

import copy
import re
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "images", "patches"}
CLUSTER_SCOPED = {"Namespace", "PriorityClass"}


def build(folder: Path) -> list[Resource]:
    """The resources of a kustomization.

    Raises:
        ValueError: a patch has no target, or something is not supported here.
        OSError: a file is missing.
    """
    return _apply(folder, [])


def _apply(folder: Path, resources: list[Resource]) -> list[Resource]:
    settings = _read(folder / "kustomization.yaml")[0]
    if unknown := settings.keys() - KNOWN:
        raise ValueError(f"{folder}: {unknown} is not supported")
    for name in settings.get("resources", []):
        path = folder / name
        resources += build(path) if path.is_dir() else _read(path)
    for name in settings.get("components", []):
        resources = _apply(folder / name, resources)
    for patch in settings.get("patches", []):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        targets = [each for each in resources if _is_target(each, patch["target"])]
        if not targets:
            raise ValueError(f"{folder}: no resource is {patch['target']}")
        change = yaml.load(text, Loader=yaml.CSafeLoader)
        if isinstance(change, dict):
            if change.get("$patch") != "delete":
                raise ValueError(f"{folder}: only JSON patches and deletions are supported")
            resources = [each for each in resources if each not in targets]
            continue
        for target in targets:
            for operation in change:
                _change(target, operation)
    for image in settings.get("images", []):
        for container in containers(resources):
            _rename(container, image)
    if "namespace" in settings:
        for each in resources:
            if each["kind"] not in CLUSTER_SCOPED:
                each["metadata"]["namespace"] = settings["namespace"]
    return resources


def containers(node: Any) -> list[Resource]:
    """All containers within."""
    if isinstance(node, list):
        return [found for each in node for found in containers(each)]
    if not isinstance(node, dict):
        return []
    found = [found for value in node.values() for found in containers(value)]
    return found + [each for key in ("containers", "initContainers") for each in node.get(key, [])]


def _read(path: Path) -> list[Resource]:
    documents = yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader)
    return [each for each in documents if each is not None]


def _is_target(resource: Resource, target: dict[str, str]) -> bool:
    return (resource["kind"], resource["metadata"]["name"]) == (target["kind"], target["name"])


def _change(resource: Resource, operation: Resource) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    *way, last = [
        part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
    ]
    node: Any = resource
    for part in way:
        node = node[int(part)] if isinstance(node, list) else node[part]
    key: Any = int(last) if isinstance(node, list) and last != "-" else last
    match operation["op"]:
        case "add" if isinstance(node, list):
            node.insert(len(node) if key == "-" else key, copy.deepcopy(operation["value"]))
        case "add":
            node[key] = copy.deepcopy(operation["value"])
        case "replace":
            node[key]  # it must be there
            node[key] = copy.deepcopy(operation["value"])
        case "remove":
            del node[key]
        case "test":
            if node[key] != operation["value"]:
                raise ValueError(f"{operation['path']} is {node[key]!r}")
        case other:
            raise ValueError(f"{other} is not supported")


def _rename(container: Resource, image: dict[str, str]) -> None:
    name, tag = re.fullmatch(r"(.+?)(?::([^/:]+))?", container["image"]).groups()
    if name == image["name"]:
        tag = image.get("newTag", tag)
        container["image"] = image.get("newName", name) + (f":{tag}" if tag else "")
