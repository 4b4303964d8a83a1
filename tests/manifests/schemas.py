"""Schemas of Kubernetes, KubeRay and the Prometheus operator, made strict: a key that they do not name is an error.

Their facts lie beside this file, gzipped; data/README.md says where they are from.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

DATA = Path(__file__).parent / "data"
_OBJECT_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_CUSTOM = ("kuberay-1.7.0.json.gz", "prometheus-operator.json.gz")


@functools.cache
def _read(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / name).read_bytes()))


@functools.cache
def validator_of(kind: str) -> Draft202012Validator | None:
    """Return what validates documents of `kind`, "apiVersion kind"; None: nobody knows such a kind."""
    core = _read("kubernetes-1.36.json.gz")
    if kind in core["kinds"]:
        return Draft202012Validator({"$ref": f"#/$defs/{core['kinds'][kind]}", "$defs": core["$defs"]})
    for name in _CUSTOM:
        if schema := _read(name).get(kind):
            strict = _strict(schema)
            strict["properties"]["metadata"] = {"$ref": f"#/$defs/{_OBJECT_META}"}
            strict["properties"].pop("status", None)
            strict["required"] = ["apiVersion", "kind", "metadata", "spec"]
            return Draft202012Validator({**strict, "$defs": core["$defs"]})
    return None


def _strict(schema: Any) -> Any:
    """Return an OpenAPI schema of a custom resource as a JSON schema that refuses what it does not name."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "default"}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        out["properties"] = {name: _strict(part) for name, part in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
        # The server fills defaults in before it looks for what is required.
        out["required"] = [name for name in schema.get("required", []) if "default" not in properties.get(name, {})]
    for key in ("items", "additionalProperties", "anyOf", "allOf", "oneOf", "not"):
        if key in schema:
            out[key] = _strict(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    elif schema.get("nullable") and isinstance(schema.get("type"), str):
        out["type"] = [schema["type"], "null"]
    return out


def schema_problems(document: dict[str, Any]) -> list[str]:
    """Return what is wrong with a document by the schema of its kind, a line each."""
    validator = validator_of(f"{document.get('apiVersion')} {document.get('kind')}")
    if validator is None:
        return [f"wanted a kind that is known here, saw {document.get('apiVersion')!r} {document.get('kind')!r}"]
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(document)]
