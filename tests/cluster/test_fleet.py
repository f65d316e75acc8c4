"""What is in cluster/ is valid, fits together, and fits the package; and the checks find faults."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.fleet.images import DOCKERFILE, check_images
from tests.support.fleet.jobs import check_job, check_submit_line, submit_lines
from tests.support.fleet.launcher import check_launcher
from tests.support.fleet.manifests import check_overlay, check_serve_config
from tests.support.fleet.schemas import check_schema
from tests.support.fleet.units import check_unit
from tests.support.kustomize import build

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RUNBOOK = CLUSTER / "README.md"
OVERLAYS = ["dev", "prod", "spot", "rocksdb"]
JOBS = sorted((CLUSTER / "kuberay" / "jobs").glob("*.yaml"))
LAUNCHERS = sorted((CLUSTER / "launcher").glob("*.yaml"))
UNITS = sorted((CLUSTER / "systemd").glob("*.service"))
SERVE_CONFIGS = sorted((ROOT / "serve_configs").glob("*.yaml"))
PAGES = [
    *sorted((ROOT / "ray_jobs").glob("*.py")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    RUNBOOK,
]
KUSTOMIZE = [["kustomize", "build"], ["kubectl", "kustomize"]]


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A copy of cluster/, with an overlay more that uses the component rocksdb."""
    copy = tmp_path / "cluster"
    shutil.copytree(CLUSTER, copy)
    overlay = copy / "kuberay" / "overlays" / "rocksdb"
    overlay.mkdir()
    settings = {"resources": ["../prod"], "components": ["../../components/rocksdb"]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(settings))
    return copy


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_and_fits_together(name: str, cluster: Path) -> None:
    assert not check_overlay(cluster / "kuberay" / "overlays" / name, RUNBOOK.read_text())


@pytest.mark.parametrize("name", ["dev", "spot", "rocksdb"])
def test_kustomize_builds_what_was_checked(name: str, cluster: Path) -> None:
    commands = [each for each in KUSTOMIZE if shutil.which(each[0])]
    if not commands:
        pytest.skip("neither kustomize nor kubectl is installed")
    folder = cluster / "kuberay" / "overlays" / name
    built = subprocess.check_output([*commands[0], str(folder)], text=True)

    def place(resource: dict[str, dict[str, str]]) -> tuple[object, str]:
        return resource["kind"], resource["metadata"]["name"]

    theirs = sorted(yaml.safe_load_all(built), key=place)
    assert theirs == sorted(build(folder), key=place)


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.stem)
def test_serve_ignores_nothing_in_a_file(path: Path) -> None:
    assert not list(check_serve_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_valid(path: Path) -> None:
    job = yaml.safe_load(path.read_text())
    assert not check_schema(job)
    assert not check_job(job, _clusters())


def test_each_kind_of_job_and_of_machine_has_its_file() -> None:
    assert {"train", "pipeline", "prepare", "evaluate", "caption"} <= {path.stem for path in JOBS}
    assert [path.stem for path in LAUNCHERS] == ["aws", "gcp", "onpremise"]
    assert [path.stem for path in UNITS] == ["ray-head", "ray-worker"]


def _clusters() -> set[str]:
    resources = build(CLUSTER / "kuberay" / "overlays" / "prod")
    return {each["metadata"]["name"] for each in resources if each["kind"] == "RayCluster"}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_ray_up_understands_a_launcher_file(path: Path) -> None:
    assert not check_launcher(path)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_and_ray_understand_a_unit(path: Path) -> None:
    assert not check_unit(path)


def test_the_images_can_be_built() -> None:
    assert not check_images(DOCKERFILE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_documented_jobs_run_beside_the_head(path: Path) -> None:
    for line in submit_lines(path):
        assert not check_submit_line(line)


def test_the_runbook_names_what_exists() -> None:
    text = RUNBOOK.read_text()
    named = re.findall(r"(?<![\w/.])((?:cluster|ray_jobs|serve_configs)/[\w/.-]*\w)", text)
    named += [
        f"cluster/{name}"
        for name in re.findall(r"`((?:kuberay|launcher|docker|systemd)/[\w/.-]+)`", text)
    ]
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_runbook_tells_what_to_do_for_each_alert() -> None:
    rules = "".join(path.read_text() for path in CLUSTER.glob("observability/**/*.y*ml"))
    alerts = set(re.findall(r"^\s*-?\s*alert: (\w+)", rules, re.MULTILINE))
    assert alerts <= set(re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE))


MANIFESTS = "kuberay/base/"
ONLINE, OFFLINE = MANIFESTS + "online.yaml", MANIFESTS + "offline.yaml"
FAULTS = [
    # types and fields of Kubernetes and KubeRay
    (MANIFESTS + "storage.yaml", "accessModes", "accessMode"),
    (MANIFESTS + "storage.yaml", "apiVersion: v1", "apiVersion: v2"),
    (MANIFESTS + "storage.yaml", "name: shared", "nam: shared"),
    (MANIFESTS + "redis.yaml", "containerPort: 6379", "containerPort: '6379'"),
    (MANIFESTS + "network.yaml", "policyTypes", "policytypes"),
    (MANIFESTS + "priorities.yaml", "value: 1000\n", "value: high\n"),
    (OFFLINE, "headGroupSpec", "headGroupSpecs"),
    (OFFLINE, "maxReplicas: 5", "maxReplicas: five"),
    (OFFLINE, "mode: token", "mode: tokens"),
    (ONLINE, "serveConfigV2: |", "serveConfig: |"),
    (ONLINE, "minAvailable: 2", "minAvailabe: 2"),
    # names that must meet
    (OFFLINE, "secretName: ray-token", "secretName: ray-tokens"),
    (OFFLINE, "key: password", "key: passwort"),
    (OFFLINE, "claimName: shared", "claimName: share"),
    (OFFLINE, "serviceAccountName: flashvl", "serviceAccountName: flashvI"),
    (OFFLINE, "priorityClassName: flashvl-offline", "priorityClassName: offline"),
    (OFFLINE, "priorityClassName: flashvl-offline", "priorityClassName: flashvl-online"),
    (OFFLINE, "redisAddress: redis:6379", "redisAddress: redis:6380"),
    (OFFLINE, "{name: shm, mountPath: /dev/shm}", "{name: shn, mountPath: /dev/shm}"),
    (OFFLINE, "component: offline}", "component: ofline}"),
    (ONLINE, "name: online-serve-svc", "name: online-svc"),
    (ONLINE, "port: {number: 8000}", "port: {number: 8001}"),
    (ONLINE, "path: /-/healthz, port: 8000", "path: /-/healthz, port: 8080"),
    (ONLINE, "ray.io/node-type: worker}\n---", "ray.io/node-type: workers}\n---"),
    (
        MANIFESTS + "network.yaml",
        "component: online}\n  policyTypes",
        "component: onlin}\n  policyTypes",
    ),
    (MANIFESTS + "network.yaml", "kubernetes.io/metadata.name: monitoring", "team: ops"),
    (MANIFESTS + "network.yaml", "  ingress:\n    - from:", "  ingress:\n    - {}\n    - from:"),
    (MANIFESTS + "redis.yaml", "name: redis\nspec:\n  selector", "name: reddis\nspec:\n  selector"),
    # what the cluster promises
    (OFFLINE, "rayVersion: 2.60.0", "rayVersion: 2.59.0"),
    (OFFLINE, 'num-cpus: "0"', 'num-cpus: "1"'),
    (OFFLINE, "image: flashvl-train", "image: flashvl-cpu"),
    (OFFLINE, "image: flashvl-train", "image: flashvl-training"),
    (OFFLINE, "sizeLimit: 240Gi", "sizeLimit: 24Gi"),
    (OFFLINE, 'DRAIN_TIMEOUT_S, value: "100"', 'DRAIN_TIMEOUTS, value: "100"'),
    (OFFLINE, "terminationGracePeriodSeconds: 120", "terminationGracePeriodSeconds: 60"),
    (OFFLINE, "runAsNonRoot: true", "runAsNonRoot: false"),
    (OFFLINE, "drop: [ALL]", "add: [SYS_ADMIN]"),
    (OFFLINE, "allowPrivilegeEscalation: false\n      capabilities", "capabilities"),
    (ONLINE, "minAvailable: 2", "maxUnavailable: 1"),
    (ONLINE, "maxReplicas: 17", "maxReplicas: 12"),
    (ONLINE, "rayClusterDeletionDelaySeconds: 300", "rayClusterDeletionDelaySeconds: 60"),
    # Serve's and our own settings
    (ONLINE, "max_replicas_per_node: 1", "max_replicas_a_node: 1"),
    (ONLINE, "max_surge_percent: 0", "max_surge_percent: 100"),
    (ONLINE, "num_cpus: 0.1", "num_cpus: 0"),
    (ONLINE, "name: EngineReplica", "name: EngineReplicas"),
    (ONLINE, "app:build_app", "app:build"),
    (ONLINE, "max_num_seqs: 64", "max_num_seq: 64"),
    (ONLINE, "/etc/flashvl/api_keys", "/etc/flash/api_keys"),
    # overlays
    ("kuberay/overlays/prod/kustomization.yaml", "../../base", "../../bases"),
    ("kuberay/overlays/prod/kustomization.yaml", "kind: Ingress", "kind: Ingres"),
    ("kuberay/overlays/prod/kustomization.yaml", "/spec/rules/0/host", "/spec/rule/0/host"),
    (
        "kuberay/overlays/prod/kustomization.yaml",
        "newName: registry.example.com/flashvl-cpu",
        "newName: cpu",
    ),
    # jobs
    ("kuberay/jobs/train.yaml", "entrypointNumCpus: 1", "entrypointNumCpus: 0"),
    ("kuberay/jobs/train.yaml", "entrypointNumCpus", "entrypointNumCPUs"),
    ("kuberay/jobs/train.yaml", "ray.io/cluster: offline", "ray.io/cluster: of-line"),
    ("kuberay/jobs/train.yaml", "static/stage1.yaml", "static/stage0.yaml"),
    ("kuberay/jobs/train.yaml", "num_workers", "num_worker"),
    ("kuberay/jobs/train.yaml", "/opt/flashvl/ray_jobs/train.py", "/opt/ray_jobs/train.py"),
    ("kuberay/jobs/pipeline.yaml", "output_dir", "output_folder"),
    ("kuberay/jobs/caption.yaml", "--gpus-per-replica", "--gpu-per-replica"),
    ("kuberay/jobs/evaluate.yaml", "--replicas 8", "--replicas"),
    # launchers
    ("launcher/aws.yaml", "max_workers: 21", "max_worker: 21"),
    ("launcher/aws.yaml", "InstanceType: p4de.24xlarge", "InstanceTyp: p4de.24xlarge"),
    ("launcher/aws.yaml", "FromPort: 22", "FromPort: 0"),
    ("launcher/aws.yaml", "GPU: 8", "GPU: 4"),
    ("launcher/aws.yaml", "flashvl-train:0.1.0", "flashvl-train:latest"),
    ("launcher/gcp.yaml", "head_node_type: head", "head_node_type: heads"),
    ("launcher/gcp.yaml", "ray start --address", "ray start --adress"),
    ("launcher/onpremise.yaml", "--num-cpus=0", "--num-cpus=8"),
    ("launcher/onpremise.yaml", "worker_ips", "workers"),
    ("launcher/onpremise.yaml", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=off"),
    # units
    ("systemd/ray-head.service", "--num-cpus=0", "--num-cpus=8"),
    ("systemd/ray-head.service", "--block ", ""),
    ("systemd/ray-head.service", "--dashboard-host", "--dashbord-host"),
    ("systemd/ray-worker.service", "${FLASHVL_HEAD}", "${RAY_HEAD}"),
    ("systemd/ray-worker.service", "Restart=always", "Restart=on-success"),
    ("systemd/ray.env", "RAY_SERVE_PROXY_USE_GRPC=1", "RAY_SERVE_PROXY_USE_GRPC=0"),
    # images
    ("docker/Dockerfile", "COPY ray_jobs ", "COPY ray_job "),
    ("docker/Dockerfile", "heif,ray,train", "heif,ray,training"),
    ("docker/Dockerfile", "--constraint constraints.txt torch", "torch"),
    ("docker/Dockerfile", "FROM cuda AS serve", "FROM gpu AS serve"),
    ("docker/Dockerfile", "USER 1000", "USER root"),
    ("docker/Dockerfile", "HF_HUB_OFFLINE=1", "HF_HUB_OFLINE=1"),
    ("docker/Dockerfile", "--target train ", "--target training "),
    ("docker/Dockerfile.dockerignore", "!ray_jobs", "!ray-jobs"),
    # the runbook
    ("README.md", "create secret generic redis", "create secret generic rediss"),
    ("README.md", "--entrypoint-num-cpus 1", "--entrypoint-cpus 1"),
    ("README.md", " --entrypoint-num-cpus 1 ", " "),
    ("README.md", "python ray_jobs/train.py ray_jobs", "python ray_jobs/trains.py ray_jobs"),
]


@pytest.mark.parametrize(("file", "old", "new"), FAULTS, ids=lambda value: value.strip()[:40])
def test_a_fault_is_found(file: str, old: str, new: str, cluster: Path) -> None:
    path = cluster / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    try:
        found = _checks(file)(cluster)
    except Exception as error:  # a parser's own
        found = [repr(error)]
    assert found


def _checks(file: str) -> Callable[[Path], list[str]]:
    """What checks a file of a copy of cluster/."""

    def check_runbook(cluster: Path) -> list[str]:
        wrong = [each for line in submit_lines(cluster / file) for each in check_submit_line(line)]
        return wrong + check_prod(cluster)

    def check_prod(cluster: Path) -> list[str]:
        runbook = (cluster / "README.md").read_text()
        return check_overlay(cluster / "kuberay" / "overlays" / "prod", runbook)

    def check_one_job(cluster: Path) -> list[str]:
        job = yaml.safe_load((cluster / file).read_text())
        return check_schema(job) or check_job(job, _clusters())

    if file.startswith("kuberay/jobs"):
        return check_one_job
    if file.startswith("launcher"):
        return lambda cluster: check_launcher(cluster / file)
    if file.startswith("systemd"):
        return lambda cluster: check_unit(cluster / file)
    if file.startswith("docker"):
        return lambda cluster: check_images(cluster / "docker" / "Dockerfile")
    return check_runbook if file == "README.md" else check_prod
