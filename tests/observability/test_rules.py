"""Rules and dashboards: they parse, and ask for metrics that flashvl or Ray exports."""

import inspect
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import ray
import yaml
from ray.serve._private.common import DeploymentStatus

from flashvl.batch import metrics as caption_metrics
from flashvl.serve import metrics as serve_metrics
from flashvl.train.run import goodput, loop
from flashvl.train.run import metrics as train_metrics
from tests.support.observability import DASHBOARDS, FOLDER, RULES, expressions, panels, rules

RUNBOOK = FOLDER.parent / "README.md"
NAME = re.compile(r"\bray_(\w+)\b")
RECORDED = re.compile(r"\b\w+:\w+:?\w*\b")
SUFFIXES = re.compile(r"(_bucket|_total)$")
PROMTOOL = shutil.which("promtool")
EXPRESSIONS = {
    **{rule.get("record") or rule["alert"]: [rule["expr"]] for rule in rules()},
    **{name: expressions(panel) for name, panel in panels()},
}


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of metrics, without `ray_` and the endings that Prometheus' formats add."""
    source = "".join(
        inspect.getsource(module)
        for module in (serve_metrics, caption_metrics, train_metrics, goodput, loop)
    )
    found = set(re.findall(r'"(flashvl_\w+)"', source))
    for keys in re.findall(r'"(\w+)": |record\["(\w+)"\] =', source):  # figures of a step
        found |= {f"flashvl_train_{key}" for key in keys if key}
    home = Path(inspect.getfile(ray)).parent
    files = [*home.glob("serve/_private/*.py"), home / "_private" / "metrics_agent.py"]
    files += home.glob("dashboard/modules/metrics/dashboards/*.py")
    for file in files:
        text = file.read_text()
        found |= set(re.findall(r'"(serve_\w+)"', text)) | set(re.findall(r"\bray_(\w+)", text))
    return {SUFFIXES.sub("", name) for name in found}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_metric_is_one_that_is_exported(name: str, exported: set[str]) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for expression in EXPRESSIONS[name]:
        asked = {SUFFIXES.sub("", found) for found in NAME.findall(expression)}
        asked_recorded = set(RECORDED.findall(expression))
        assert asked or asked_recorded or "up{" in expression
        assert asked <= exported, expression
        assert asked_recorded <= recorded, expression


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_own_tool_accepts_everything(tmp_path: Path) -> None:
    """Panels' queries are checked as rules, which is how the tool takes them."""
    assert PROMTOOL is not None
    queries = [each for _, panel in panels() for each in expressions(panel)]
    asked = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(queries)]
    (tmp_path / "panels.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]})
    )
    for kind, files in (
        ("config", [FOLDER / "prometheus.yml"]),
        ("rules", [*RULES, tmp_path / "panels.yml"]),
    ):
        command = [PROMTOOL, "check", kind, *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_section_in_the_runbook() -> None:
    anchors = {each.lower() for each in re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.M)}
    for rule in rules():
        if "alert" not in rule:
            continue
        url = rule["annotations"]["runbook_url"]
        assert url == f"cluster/README.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert url.partition("#")[2] in anchors, f"cluster/README.md explains no {rule['alert']}"


def test_the_heads_that_are_asked_for_nodes_are_those_of_the_manifests() -> None:
    base = FOLDER.parent / "kuberay" / "base"
    (namespace, *_) = yaml.safe_load_all((base / "namespace.yaml").read_text())
    clusters = [
        manifest["metadata"]["name"]
        for name in ("online", "offline")
        for manifest in yaml.safe_load_all((base / f"{name}.yaml").read_text())
        if manifest["kind"] in ("RayService", "RayCluster")
    ]
    (scraped,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    # KubeRay names the service of a head.
    assert [each["url"] for each in scraped["http_sd_configs"]] == [
        f"http://{name}-head-svc.{namespace['metadata']['name']}:8265/api/prometheus/sd"
        for name in clusters
    ]


def test_the_states_of_a_deployment_that_waits_for_engines_are_the_lower_numbers() -> None:
    waits = {status.name for status in DeploymentStatus if status.to_numeric() < 5}
    assert waits == {"DEPLOY_FAILED", "UNHEALTHY", "UPDATING", "UPSCALING"}


def test_names_are_given_once() -> None:
    names = [rule.get("record") or rule["alert"] for rule in rules()]
    assert max(Counter(names).values()) == 1


def test_grafana_finds_what_it_is_to_provide() -> None:
    assert [path.stem for path in DASHBOARDS] == ["captioning", "serving", "training"]
    provisioning = FOLDER / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards/flashvl.yml").read_text())["providers"]
    assert provider["options"]["path"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for name, panel in panels():
        assert panel["description"].endswith("."), name
        assert panel["fieldConfig"]["defaults"]["unit"], name
        assert all(target["legendFormat"] for target in panel["targets"]), name


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path: Path) -> None:
    places = [
        (panel["gridPos"]["x"], panel["gridPos"]["y"], panel["id"])
        for name, panel in panels()
        if name.startswith(f"{path.stem}:")
    ]
    assert (
        len({place[:2] for place in places}) == len({place[2] for place in places}) == len(places)
    )
