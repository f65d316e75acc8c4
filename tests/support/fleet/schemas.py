"""Whether resources have the fields and types of their kinds, by published schemas."""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from tests.support.kustomize import Resource

SCHEMAS = Path(__file__).parents[2] / "cluster" / "schemas"
METADATA = "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def check_schema(resource: Resource) -> list[str]:
    kind = f"{resource['apiVersion']}/{resource['kind']}"
    validator = _validator(kind)
    if validator is None:
        return [f"{kind} is not a known kind"]
    error = best_match(validator.iter_errors(resource))
    return [] if error is None else [f"{kind}: {error.json_path}: {error.message[:300]}"]


@functools.cache
def _validator(kind: str) -> Draft202012Validator | None:
    schema = _schemas().get(kind)
    return None if schema is None else Draft202012Validator(schema)


@functools.cache
def _schemas() -> dict[str, Any]:
    kubernetes = json.loads(gzip.decompress((SCHEMAS / "kubernetes-1.34.json.gz").read_bytes()))
    shared = kubernetes.pop("$defs")
    schemas = {kind: {"$defs": shared, **schema} for kind, schema in kubernetes.items()}
    kuberay = json.loads(gzip.decompress((SCHEMAS / "kuberay-1.7.0.json.gz").read_bytes()))
    for kind, schema in kuberay.items():
        closed = _close(schema)
        closed["properties"]["metadata"] = {"$ref": METADATA}
        schemas[f"ray.io/v1/{kind}"] = {"$defs": shared, **closed}
    return schemas


def _close(schema: Any) -> Any:
    """Refuse fields that are not listed, as `kubectl apply` does; the schema itself admits them."""
    if isinstance(schema, list):
        return [_close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _close(value) for key, value in schema.items()}
    is_object = isinstance(closed.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
