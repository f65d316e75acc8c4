"""The OpenAPI description is true: whatever is generated from it has an answer that it describes."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.conftest import Service, ask, encode, noise

PATHS = [
    "/v1/chat/completions",
    "/v1/captions",
    "/v1/models",
    "/v1/models/{model}",
    "/tokenize",
    "/v1/tiles",
    "/v1/batches",
    "/v1/batches/{batch_id}",
    "/v1/batches/{batch_id}/cancel",
    "/healthz",
    "/readyz",
]
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


@pytest.fixture(scope="module")
def schema(service: Service) -> Iterator[object]:
    yield schemathesis.openapi.from_url(f"{service.url}/openapi.json")


lazy = schemathesis.pytest.from_fixture("schema")


@lazy.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_generated_request_has_an_answer_of_the_description(
    case: schemathesis.Case,
) -> None:
    assert case.path in PATHS
    if isinstance(case.body, dict) and "model" in case.body:
        # Half of them get further than the model's name.
        if len(str(case.body)) % 2:
            case.body["model"] = "tiny"
        if len(str(case.body)) % 3 == 0:
            case.body["messages"] = ask("Hi", encode(noise(0)))
    case.call_and_validate(checks=CHECKS, timeout=60)
