"""Engines get a GPU each where the cluster has any, whether a job or the service starts them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import PICTURES

pytestmark = pytest.mark.usefixtures("starts_ray")


def in_cluster(code: str, **resources: int) -> Any:
    """What `code` prints as JSON, on a Ray of its own with these resources."""
    begin = f"import json, ray\nray.init(address='local', include_dashboard=False, **{resources})\n"
    line = [sys.executable, "-c", begin + textwrap.dedent(code)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


BY_SERVICE = """
    from flashvl.serve.app import build_app
    from flashvl.serve.config import ServiceConfig

    def reserved(**options):
        _, engines = build_app(ServiceConfig(**options))._bound_deployment.init_args
        options = engines._bound_deployment.ray_actor_options
        is_hidden = "CUDA_VISIBLE_DEVICES" in options["runtime_env"]["env_vars"]
        return options["num_gpus"], is_hidden

    def all_reserved():
        return [reserved(), *(reserved(gpus_per_replica=each) for each in (None, 1, 0.5, 0))]
"""


def test_a_service_on_a_cluster_with_gpus() -> None:
    told = in_cluster(
        f"{BY_SERVICE}\n    print(json.dumps(all_reserved()))", num_cpus=2, num_gpus=1
    )
    assert told == [[1, False], [1, False], [1, False], [0.5, False], [0, True]]


def test_a_service_on_a_cluster_without_gpus_and_then_with_some_to_come() -> None:
    code = """
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    without = all_reserved()
    group = NodeGroupConfig(resources={"CPU": 8, "GPU": 4}, max_count=2, name="gpu")
    config = ClusterConfig(node_group_configs=[group])
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    gcs.report_cluster_config(config.SerializeToString())
    print(json.dumps([without, all_reserved()]))
    """
    without, growing = in_cluster(BY_SERVICE + code, num_cpus=2, num_gpus=0)
    given = [[1, False], [0.5, False], [0, False]]
    assert without == [[0, False], [0, False], *given]
    assert growing == [[1, False], [1, False], *given]


@pytest.mark.parametrize(
    ("configured", "free"), [(None, 1.0), pytest.param(0, 2.0, marks=pytest.mark.slow)]
)
def test_a_job_on_a_cluster_with_gpus(
    tiny_random: Path, tmp_path: Path, configured: float | None, free: float
) -> None:
    """The GPUs that are left while an engine captions."""
    pq.write_table(pa.table({"image": PICTURES[:4]}), tmp_path / "in.parquet")
    code = f"""
        import threading
        from flashvl.batch.config import CaptionJob
        from flashvl.batch.job import run_caption_job

        job = CaptionJob(
            input={str(tmp_path / "in.parquet")!r},
            output={str(tmp_path / "out")!r},
            model={str(tiny_random)!r},
            max_new_tokens=4,
            gpus_per_replica={configured},
        )
        free, is_over = [], threading.Event()

        def watch():
            while not is_over.wait(0.05):
                free.append(ray.available_resources().get("GPU", 0.0))

        watching = threading.Thread(target=watch)
        watching.start()
        run_caption_job(job)
        is_over.set()
        watching.join()
        print(json.dumps(min(free)))
    """
    assert in_cluster(code, num_cpus=3, num_gpus=2) == free
