"""The rules and dashboards in `cluster/observability/`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "observability"
RULES = sorted((FOLDER / "rules").glob("*.yml"))
DASHBOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))


def rules() -> Iterator[dict[str, Any]]:
    """Recording rules and alerts."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """The panels of all dashboards, each with its dashboard's name and its own title."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            yield f"{path.stem}: {panel['title']}", panel


def expressions(panel: dict[str, Any]) -> list[str]:
    """The panel's queries, for all values of the dashboard's variables."""
    found = [target["expr"] for target in panel["targets"]]
    return [each.replace("$application", ".*").replace("$stage", ".*") for each in found]
