"""Whether the manifests of an overlay fit each other, the images, the runbook and the package."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from flashvl.config import pool_of
from flashvl.serve.config import ServiceConfig
from tests.support.fleet.images import targets
from tests.support.fleet.schemas import check_schema
from tests.support.kustomize import Resource, build, containers

ROOT = Path(__file__).parents[3]
SIZE = re.compile(r"(\d+)(Mi|Gi|Ti)")
UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
AGENT_PORT = 52365
"""Port at which Ray's agent of a node tells its health."""
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""Variable with the seconds that Ray drains a node before it ends."""
PROXY_HEALTH = "/-/healthz"
"""Path at which Serve's proxy of a node tells its health."""
DEPLOYMENTS = {"EngineReplica", "Ingress"}
"""What flashvl.serve.app:build_app deploys."""
OUTSIDE = {
    ("ingress-nginx", "online", 8000),
    *(("kuberay", cluster, 8265) for cluster in ("online", "offline")),
    *(
        ("monitoring", cluster, port)
        for cluster in ("online", "offline")
        for port in (8080, 8265, 44217, 44227)
    ),
}
"""Who may reach what from other namespaces: the service's route, KubeRay, Prometheus."""


@dataclass(kw_only=True)
class Pod:
    """A pod that the manifests make."""

    where: str
    labels: dict[str, str]
    spec: Resource
    params: dict[str, str] | None
    """What `ray start` is told; None: no node of Ray."""

    @property
    def container(self) -> Resource:
        first: Resource = self.spec["containers"][0]
        return first

    @property
    def is_head(self) -> bool:
        return self.labels.get("ray.io/node-type") == "head"

    @property
    def num_gpus(self) -> int:
        return int(self.container["resources"]["limits"].get("nvidia.com/gpu", 0))


def check_overlay(folder: Path, runbook: str) -> list[str]:
    """What is wrong with an overlay.

    Args:
        runbook: text of cluster/README.md, which makes the secrets.
    """
    resources = build(folder)
    if wrong := [wrong for each in resources for wrong in check_schema(each)]:
        return wrong
    pods = list(_pods(resources))
    by_kind: dict[str, dict[str, Resource]] = {}
    for each in resources:
        by_kind.setdefault(each["kind"], {})[each["metadata"]["name"]] = each
    wrong = [wrong for pod in pods for wrong in _check_pod(pod, by_kind, runbook)]
    for where, spec in _clusters(resources):
        wrong += [f"{where}: {each}" for each in _check_cluster(spec, by_kind, runbook)]
    wrong += _check_service(by_kind, pods)
    wrong += _check_budgets(by_kind, pods)
    wrong += _check_policies(by_kind, pods)
    return wrong


def _clusters(resources: list[Resource]) -> Iterator[tuple[str, Resource]]:
    for each in resources:
        if each["kind"] in ("RayCluster", "RayService"):
            spec = each["spec"]
            yield each["metadata"]["name"], spec.get("rayClusterConfig", spec)


def _pods(resources: list[Resource]) -> Iterator[Pod]:
    for name, spec in _clusters(resources):
        groups = [("head", spec["headGroupSpec"])]
        groups += [("worker", group) for group in spec["workerGroupSpecs"]]
        for kind, group in groups:
            template = group["template"]
            yield Pod(
                where=f"{name} {group.get('groupName', 'head')}",
                # KubeRay adds these labels.
                labels=template["metadata"]["labels"] | {"ray.io/node-type": kind},
                spec=template["spec"],
                params=group["rayStartParams"],
            )
    for each in resources:
        if each["kind"] == "StatefulSet":
            template = each["spec"]["template"]
            labels, spec = template["metadata"]["labels"], template["spec"]
            yield Pod(where=each["metadata"]["name"], labels=labels, spec=spec, params=None)


def _check_pod(pod: Pod, by_kind: dict[str, Any], runbook: str) -> Iterator[str]:
    for wrong in (
        *_check_references(pod, by_kind, runbook),
        *_check_rights(pod),
        *_check_image(pod),
        *(_check_ray(pod) if pod.params is not None else ()),
    ):
        yield f"{pod.where}: {wrong}"


def _check_references(pod: Pod, by_kind: dict[str, Any], runbook: str) -> Iterator[str]:
    if pod.spec["priorityClassName"] not in by_kind["PriorityClass"]:
        yield f"no priority class {pod.spec['priorityClassName']}"
    account = pod.spec.get("serviceAccountName")
    if account is not None and account not in by_kind["ServiceAccount"]:
        yield f"no service account {account}"
    claimed = by_kind.get("StatefulSet", {}).get(pod.where, {"spec": {}})["spec"]
    volumes = {each["name"] for each in pod.spec.get("volumes", [])}
    volumes |= {each["metadata"]["name"] for each in claimed.get("volumeClaimTemplates", [])}
    mounts = {each["name"] for each in pod.container["volumeMounts"]}
    if volumes != mounts:
        yield f"volumes {sorted(volumes)} are mounted as {sorted(mounts)}"
    for volume in pod.spec.get("volumes", []):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in by_kind["PersistentVolumeClaim"]:
            yield f"no claim {claim}"
    for secret, key in _secrets([pod.spec]):
        yield from _check_secret(secret, key, runbook)
    for probe in ("readinessProbe", "livenessProbe"):
        if probe not in pod.container:
            yield f"no {probe}"
        elif "httpGet" in pod.container[probe]:
            asked = pod.container[probe]["httpGet"]
            ports = {each["name"]: each["containerPort"] for each in pod.container["ports"]}
            right = ports.get("serve") if asked["path"] == PROXY_HEALTH else AGENT_PORT
            if asked["port"] != right:
                yield f"{probe} asks for {asked['path']} at {asked['port']}, not at {right}"


def _secrets(node: Any) -> Iterator[tuple[str, str | None]]:
    """The secrets that must be there, with their keys."""
    if isinstance(node, list):
        for each in node:
            yield from _secrets(each)
    elif isinstance(node, dict):
        if "secretKeyRef" in node:
            yield node["secretKeyRef"]["name"], node["secretKeyRef"]["key"]
        if "secretName" in node:
            yield node["secretName"], None
        for value in node.values():
            yield from _secrets(value)


def _check_secret(name: str, key: str | None, runbook: str) -> Iterator[str]:
    line = re.search(rf"create secret (?:generic|tls) {re.escape(name)} (.*)", runbook)
    if line is None:
        yield f"the runbook makes no secret {name}"
    elif key is not None and f"--from-literal={key}=" not in line.group(1):
        yield f"the runbook gives the secret {name} no key {key}"


def _check_rights(pod: Pod) -> Iterator[str]:
    """What the namespace's label `restricted` demands; Kubernetes would refuse the pod."""
    context = pod.spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "has no seccomp profile"
    for container in containers(pod.spec):
        yield from _check_container_rights(container)


def _check_container_rights(container: Resource) -> Iterator[str]:
    allowed = container.get("securityContext", {})
    if allowed.get("allowPrivilegeEscalation") is not False:
        yield "a container may raise its privileges"
    if allowed.get("capabilities") != {"drop": ["ALL"]}:
        yield "a container has capabilities"


def _check_image(pod: Pod) -> Iterator[str]:
    image = pod.container["image"]
    name, _, tag = image.rpartition("/")[2].partition(":")
    if not tag or tag == "latest":
        yield f"the image {image} has no version"
    if pod.params is None:
        return
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if tag != version:
        yield f"the image {image} is not of version {version}"
    if name.removeprefix("flashvl-") not in targets():
        yield f"the Dockerfile makes no {name}"
    if (name == "flashvl-cpu") == bool(pod.num_gpus):
        yield f"{pod.num_gpus} GPUs with the image {name}"


def _check_ray(pod: Pod) -> Iterator[str]:
    if pod.is_head and pod.params.get("num-cpus") != "0":
        yield "the head has CPUs, and would run drivers and replicas"
    (shm,) = [
        each["emptyDir"]
        for each in pod.spec["volumes"]
        if each["name"] == "shm" and each["emptyDir"]["medium"] == "Memory"
    ]
    store = int(pod.params["object-store-memory"])
    memory = _bytes(pod.container["resources"]["limits"]["memory"])
    if not store < _bytes(shm["sizeLimit"]) < memory / 2:
        yield f"object store {store}, /dev/shm {shm['sizeLimit']} and memory {memory} do not fit"
    if (
        pod.container["resources"]["requests"]["memory"]
        != (pod.container["resources"]["limits"]["memory"])
    ):
        yield "may use memory that it has not requested, and be killed for it"
    (mount,) = [each for each in pod.container["volumeMounts"] if each["name"] == "shm"]
    if mount["mountPath"] != "/dev/shm":
        yield "the volume shm is not /dev/shm"
    drain_s = {each["name"]: each.get("value") for each in pod.container["env"]}[DRAIN]
    if int(drain_s) >= pod.spec.get("terminationGracePeriodSeconds", 30):
        yield f"is killed before it is drained ({drain_s} s)"


def _bytes(size: str) -> int:
    number, unit = SIZE.fullmatch(size).groups()
    return int(number) * UNITS[unit]


def _check_cluster(spec: Resource, by_kind: dict[str, Any], runbook: str) -> Iterator[str]:
    version = ray_version()
    if spec["rayVersion"] != version:
        yield f"Ray {spec['rayVersion']}, but constraints.txt has {version}"
    auth = spec.get("authOptions", {})
    if auth.get("mode") != "token" or "secretName" not in auth:
        yield "asks for no token"
    else:
        yield from _check_secret(auth["secretName"], "auth_token", runbook)
    storage = spec.get("gcsFaultToleranceOptions", {})
    if storage.get("backend") != "rocksdb":
        host, _, port = storage.get("redisAddress", "").partition(":")
        service = by_kind.get("Service", {}).get(host)
        if service is None or port not in {str(each["port"]) for each in service["spec"]["ports"]}:
            yield f"no Redis at {host}:{port}, so it does not survive its head"
        yield from (
            wrong
            for secret, key in _secrets(storage)
            for wrong in _check_secret(secret, key, runbook)
        )
    yield from _check_container_rights(spec["autoscalerOptions"])
    for group in spec["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["maxReplicas"]:
            yield f"minReplicas of {group['groupName']} exceed maxReplicas"


def ray_version() -> str:
    found = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


def _check_service(by_kind: dict[str, Any], pods: list[Pod]) -> Iterator[str]:
    """Whether requests find their way, and the replicas their GPUs."""
    (name,) = by_kind["RayService"]
    spec = by_kind["RayService"][name]["spec"]
    deployed = yaml.safe_load(spec["serveConfigV2"])
    port = deployed["http_options"]["port"]
    for pod in pods:
        if pod.labels["app.kubernetes.io/component"] == name:
            ports = {each["name"]: each["containerPort"] for each in pod.container["ports"]}
            if ports.get("serve") != port:
                yield f"{pod.where}: the port `serve` is not {port}"
    if deployed["http_options"]["host"] != "0.0.0.0":
        yield "Serve listens to its own pod alone"
    for rule in by_kind["Ingress"][name]["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            backend = path["backend"]["service"]
            if backend != {"name": f"{name}-serve-svc", "port": {"number": port}}:
                yield f"the route leads to {backend}, which KubeRay does not make"
    if not spec["excludeHeadPodFromServeSvc"]:
        yield "requests go through the head"
    yield from check_serve_config(deployed)
    config = ServiceConfig.model_validate(deployed["applications"][0]["args"])
    if spec["rayClusterDeletionDelaySeconds"] <= config.request_timeout_s:
        yield "the old cluster is removed before its requests have ended"
    folder = {each["mountPath"] for each in _workers(by_kind)[0]["volumeMounts"]}
    if config.api_keys_file is None or str(Path(config.api_keys_file).parent) not in folder:
        yield f"no volume has the API keys {config.api_keys_file}"
    least, most = pool_of(config.replicas)
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    pod_gpus = int(_workers(by_kind)[0]["resources"]["limits"].get("nvidia.com/gpu", 0))
    need = config.gpus_per_replica or 0
    if bool(need) != bool(pod_gpus):
        yield f"replicas take {need} GPUs, workers have {pod_gpus}"
    surge = 1 if most > least else 0
    if need and group["maxReplicas"] * pod_gpus < (most + surge) * need:
        yield f"{group['maxReplicas']} workers have no room for {most} replicas and one more"
    if group["minReplicas"] < 2:
        yield "fewer than two workers for the two ingress replicas"


def check_serve_config(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a file for `serve deploy`, which ignores what it does not know."""
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    deployments = application.get("deployments", [])
    for model, given in (
        (ServeDeploySchema, config),
        (ServeApplicationSchema, application),
        *((DeploymentSchema, each) for each in deployments),
    ):
        if unknown := given.keys() - model.model_fields.keys():
            yield f"Serve knows no {sorted(unknown)}"
    if application["import_path"] != "flashvl.serve.app:build_app":
        yield f"no application {application['import_path']}"
    for each in deployments:
        if each["name"] not in DEPLOYMENTS:
            yield f"no deployment {each['name']}"
        if each["name"] == "Ingress":
            placed = (each["max_replicas_per_node"], each["max_surge_percent"])
            if each["num_replicas"] < 2 or placed != (1, 0):
                yield "the ingress is not spread, or waits for a node more when it is replaced"
            if not each["ray_actor_options"]["num_cpus"]:
                yield "the ingress may run on the head"


def _workers(by_kind: dict[str, Any]) -> list[Resource]:
    (service,) = by_kind["RayService"].values()
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return list(group["template"]["spec"]["containers"])


def _check_budgets(by_kind: dict[str, Any], pods: list[Pod]) -> Iterator[str]:
    (service,) = by_kind["RayService"].values()
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for name, budget in by_kind["PodDisruptionBudget"].items():
        spec = budget["spec"]
        if not any(_selects(spec["selector"], pod.labels) for pod in pods):
            yield f"the budget {name} is for no pod"
        # Kubernetes counts nothing else for pods whose owner it does not know.
        if not isinstance(spec.get("minAvailable"), int) or "maxUnavailable" in spec:
            yield f"the budget {name} needs a number as minAvailable"
        elif not 2 <= spec["minAvailable"] <= group["minReplicas"]:
            yield f"the budget {name} does not fit {group['minReplicas']} workers"
    online, offline = (
        by_kind["PriorityClass"][f"flashvl-{each}"] for each in ("online", "offline")
    )
    if online["value"] <= offline["value"]:
        yield "offline work does not make room for the service"
    for pod in pods:
        cluster = pod.labels["app.kubernetes.io/component"]
        wanted = "offline" if cluster == "offline" and not pod.is_head else "online"
        if pod.spec["priorityClassName"] != f"flashvl-{wanted}":
            yield f"{pod.where} has the priority {pod.spec['priorityClassName']}"


def _check_policies(by_kind: dict[str, Any], pods: list[Pod]) -> Iterator[str]:
    policies = by_kind["NetworkPolicy"]
    if not any(
        each["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
        for each in policies.values()
    ):
        yield "pods that no policy names can be reached"
    outside = set()
    inside: set[tuple[str, str]] = set()
    for name, policy in policies.items():
        chosen = [pod for pod in pods if _selects(policy["spec"]["podSelector"], pod.labels)]
        if not chosen:
            yield f"the policy {name} is for no pod"
        to = {pod.labels["app.kubernetes.io/component"] for pod in chosen}
        for rule in policy["spec"].get("ingress", []):
            ports = {each["port"] for each in rule.get("ports", [])}
            for peer in rule.get("from") or [{}]:
                if peer.keys() == {"podSelector"}:
                    inside |= {
                        (pod.where, each)
                        for pod in pods
                        for each in to
                        if _selects(peer["podSelector"], pod.labels)
                    }
                elif peer.keys() == {"namespaceSelector"}:
                    labels = peer["namespaceSelector"]["matchLabels"]
                    namespace = labels.get("kubernetes.io/metadata.name")
                    outside |= {(namespace, each, port) for each in to for port in ports or {0}}
                else:
                    yield f"the policy {name} lets in {peer or 'everyone'}"
    if outside != OUTSIDE:
        yield f"reached from outside: {sorted(map(str, outside ^ OUTSIDE))} differ"
    for pod in pods:
        cluster = pod.labels["app.kubernetes.io/component"]
        if cluster != "redis" and (pod.where, cluster) not in inside:
            yield f"{pod.where} cannot reach its own cluster"
        if "Service" in by_kind and (pod.is_head != ((pod.where, "redis") in inside)):
            yield f"{pod.where}: heads, and nothing else, must reach Redis"


def _selects(selector: Resource, labels: dict[str, str]) -> bool:
    is_equal = all(
        labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()
    )
    return is_equal and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", [])
    )
