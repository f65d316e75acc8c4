"""A network of simulated hosts for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import CAN_MAKE_HOSTS, Network, make_network
from tests.support.rehearsal import logs_shown


@pytest.fixture
def network(starts_ray: None, tmp_path: Path) -> Iterator[Network]:
    if not CAN_MAKE_HOSTS:
        pytest.skip("simulated hosts need root, iproute2 and util-linux")
    folder = tmp_path / "hosts"
    folder.mkdir()
    with make_network(folder) as network, logs_shown(network):
        yield network
