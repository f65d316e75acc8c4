"""The service that the tests of this folder share: `tiny` over HTTP on a Ray cluster of its own."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from ray.cluster_utils import Cluster

from flashvl.engine import Engine
from tests.support.cluster import head_of_its_own
from tests.support.serving import Service, serving, wait_until_idle


@pytest.fixture(scope="session")
def batch_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="session")
def cluster(starts_ray: None) -> Iterator[Cluster]:
    """One node, whose agent takes jobs, and tells of metrics every second rather than every ten."""
    head = head_of_its_own(num_cpus=4)
    head["_system_config"] = {"metrics_report_interval_ms": 1000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def service(cluster: Cluster, batch_root: Path) -> Iterator[Service]:
    """Answers in fp32, so that the engine in the tests' process says the same."""
    options = ("--dtype=float32", f"--batch-root={batch_root}", "--max-num-seqs=8")
    with serving(*options, RAY_ADDRESS=cluster.address) as started:
        yield started


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The service's model in the tests' own process; its answers are what the service must say."""
    return Engine.from_pretrained("tiny", "float32")


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    """The service's URL; a test must leave no request running or waiting."""
    yield service.url
    wait_until_idle(service.url)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
