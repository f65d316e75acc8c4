"""The OpenAPI description is true: every request made from it has an answer that it describes."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.images import encode, noise
from tests.support.serving import Service, ask

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/captions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/tiles"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
    ("GET", "/health"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/version"),
    ("GET", "/model-card"),
]
GOOD = {"messages": ask("Hi", encode(noise(0))), "prompt": "Hi", "input": "Hi"}
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


@pytest.fixture(scope="module")
def schema(service: Service) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def test_the_description_is_of_these_operations(schema: schemathesis.BaseSchema) -> None:
    found = {(each.ok().method.upper(), each.ok().path) for each in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_generated_request_has_an_answer_of_the_description(
    schema: schemathesis.BaseSchema, method: str, path: str, data: st.DataObject
) -> None:
    case = data.draw(schema[path][method].as_strategy())
    if isinstance(case.body, dict) and "model" in case.body:
        # Otherwise every request would fail at the model's name or at the pictures.
        if data.draw(st.booleans()):
            case.body["model"] = "tiny"
        if data.draw(st.booleans()):
            for name, value in GOOD.items():
                if name in case.body:
                    case.body[name] = value
    case.call_and_validate(checks=CHECKS, timeout=60)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_every_event_of_a_stream_is_as_described(
    schema: schemathesis.BaseSchema, path: str
) -> None:
    operation = schema[path]["POST"]
    field = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    case = operation.Case(
        body={"model": "tiny", field: GOOD[field], "stream": True}, media_type="application/json"
    )
    case.call_and_validate(checks=CHECKS, timeout=60)
