"""The files of serve_configs/: Serve accepts them, and so does flashvl."""

from pathlib import Path

import pytest
import requests
import yaml
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from flashvl.config import load_config, pool_of
from flashvl.errors import ConfigError
from flashvl.serve.app import build_app, place_ingress
from flashvl.serve.config import ServiceConfig
from tests.support.images import encode, noise
from tests.support.serving import deploying

CONFIGS = sorted((Path(__file__).parents[2] / "serve_configs").glob("*.yaml"))


def test_there_are_these() -> None:
    assert [path.stem for path in CONFIGS] == ["autoscale", "iss", "static", "tiny"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_builds_an_application(path: Path, ray_cluster: None) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "flashvl.serve.app:build_app"
    config = ServiceConfig.model_validate(application.args)
    ingress = build_app(config)
    (engines,) = [
        value
        for value in ingress._bound_deployment.init_args
        if hasattr(value, "_bound_deployment")
    ]
    deployment = engines._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == (config.gpus_per_replica or 0)
    least, most = pool_of(config.replicas)
    if least == most:
        assert deployment.num_replicas == least
    else:
        told = application.deployments[0].autoscaling_config
        built = deployment._deployment_config.autoscaling_config
        assert AutoscalingConfig(**told) == built
        assert (built.min_replicas, built.max_replicas) == (least, most)
    for each in (ingress._bound_deployment, deployment):
        assert each._deployment_config.max_surge_percent > 0
    named = {override.name for override in application.deployments}
    assert named <= {ingress._bound_deployment.name, deployment.name}


def test_an_unknown_setting_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("max_num_seq: 3")
    with pytest.raises(ConfigError, match="Did you mean 'max_num_seqs'"):
        load_config(ServiceConfig, tmp_path / "x.yaml")


@pytest.mark.usefixtures("starts_ray")
@pytest.mark.slow
def test_tiny_is_deployed_by_serves_own_command() -> None:
    """On a cluster of its own, as a platform engineer does it."""
    with deploying() as deployment:
        deployment.deploy(yaml.safe_load((CONFIGS[0].parent / "tiny.yaml").read_text()))
        answer = requests.post(
            f"{deployment.url}/v1/captions", files={"image": encode(noise(0))}, timeout=30
        )
        assert answer.json()["caption"]


ON_ONE_MACHINE = {"node:__internal_head__": 1.0, "CPU": 8.0}
HEAD_WITHOUT_CPUS = {"node:__internal_head__": 1.0, "memory": 1e9}
WORKER = {"CPU": 16.0, "GPU": 1.0}


@pytest.mark.parametrize("workers", [[], [WORKER], [WORKER] * 5], ids=len)
def test_a_head_without_cpus_gets_no_ingress(workers: list[dict[str, float]]) -> None:
    """Also while no worker has joined: KubeRay deploys as soon as the head answers."""
    options = place_ingress([*workers, HEAD_WITHOUT_CPUS])
    deployment = serve.deployment(**options)(object)
    replica = deployment._replica_config
    assert (deployment.num_replicas, replica.max_replicas_per_node) == (2, 1)
    assert replica.ray_actor_options["num_cpus"] > HEAD_WITHOUT_CPUS.get("CPU", 0)
    # A surplus replica would have no node, and a roll-out would wait for it for ever.
    assert deployment._deployment_config.max_surge_percent == 0


@pytest.mark.parametrize("workers", [[], [WORKER]], ids=len)
def test_one_machine_gets_one_ingress(workers: list[dict[str, float]]) -> None:
    options = place_ingress([ON_ONE_MACHINE, *workers])
    deployment = serve.deployment(**options)(object)
    assert (deployment.num_replicas, deployment._replica_config.max_replicas_per_node) == (1, None)
    assert deployment._replica_config.ray_actor_options["num_cpus"] == 0
