"""A serveConfigV2, key by key.

Ray's ServeDeploySchema finds wrong types, but takes misspelt keys at nearly every level and runs without them: so the
document is walked beside the fields of its models.
"""

from __future__ import annotations

import types
import typing
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from cluster.config import KvrayConfig, parse_config
from messages.errors import ConfigError
from tests.manifests.kustomize import KustomizeError, load_once

#: What Ray takes as a mapping of anything, and what is in it all the same.
_MODEL_OF_MAPPING: dict[str, type[BaseModel]] = {
    "autoscaling_config": AutoscalingConfig,
    "autoscaling_policy": AutoscalingPolicy,
}
#: What Ray takes as a mapping of anything, and what may be in it.
_KEYS_OF_MAPPING = {"runtime_env": RuntimeEnv.known_fields}
_OURS = {"import_path": "cluster.app:build", "name": "kvray", "route_prefix": "/"}
_DEPLOYMENTS = {"Ingress", "Router", "Prefill", "Decode"}


def serve_config_problems(text: str) -> list[str]:
    """Return what is wrong with a serveConfigV2, a line each."""
    try:
        document = load_once(text)
    except (yaml.YAMLError, KustomizeError) as error:
        return [f"wanted YAML, saw {' '.join(str(error).split())}"]
    if not isinstance(document, dict):
        return [f"wanted a mapping, saw {document!r}"]
    problems = _unknown_keys(document, ServeDeploySchema, "")
    try:
        applications = ServeDeploySchema.model_validate(document).applications
    except ValidationError as error:
        return [*problems, *(f"{'/'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())]
    if len(applications) != 1:
        problems.append(f"wanted one application, saw {len(applications)}")
    for application in document.get("applications") or []:
        problems += _application_problems(application)
    return problems


def config_of(text: str) -> KvrayConfig:
    """Return our configuration in a serveConfigV2 that has no problems."""
    return parse_config(yaml.safe_load(text)["applications"][0].get("args") or {})


def _application_problems(application: dict[str, Any]) -> list[str]:
    problems = [
        f"{key}: wanted {wanted}, saw {application.get(key)!r}"
        for key, wanted in _OURS.items()
        if application.get(key) != wanted
    ]
    for deployment in application.get("deployments", []):
        if deployment["name"] not in _DEPLOYMENTS:
            problems.append(f"deployments: wanted one of {sorted(_DEPLOYMENTS)}, saw {deployment['name']!r}")
        if isinstance(settings := deployment.get("autoscaling_config"), dict):
            problems += _model_problems(AutoscalingConfig, settings)
    if policy := application.get("autoscaling_policy"):
        problems += _model_problems(AutoscalingPolicy, policy)
    try:
        parse_config(application.get("args") or {})
    except ConfigError as error:
        problems.append(f"args: {error.message}")
    return problems


def _model_problems(model: type[BaseModel], settings: dict[str, Any]) -> list[str]:
    try:
        model(**settings)
    except (ValidationError, ImportError, AttributeError, ValueError) as error:
        return [f"{model.__name__}: {' '.join(str(error).split())}"]
    return []


def _unknown_keys(value: Any, wanted: Any, place: str) -> list[str]:
    """Return the keys below `value` that are no field of the models in the annotation `wanted`."""
    if isinstance(wanted, type) and issubclass(wanted, BaseModel):
        if not isinstance(value, dict):
            return []  # a wrong type, which the model says itself
        problems = []
        for key, part in value.items():
            where = f"{place}/{key}"
            if key not in wanted.model_fields:
                problems.append(f"{where}: no such key; wanted one of {sorted(wanted.model_fields)}")
            elif isinstance(part, dict) and key in _KEYS_OF_MAPPING:
                problems += [f"{where}/{name}: no such key" for name in part if name not in _KEYS_OF_MAPPING[key]]
            else:
                problems += _unknown_keys(part, _MODEL_OF_MAPPING.get(key, wanted.model_fields[key].annotation), where)
        return problems
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        models = [part for part in arguments if isinstance(part, type) and issubclass(part, BaseModel)]
        others = [part for part in arguments if typing.get_origin(part) is list]
        return [problem for part in models + others for problem in _unknown_keys(value, part, place)]
    if origin is list and isinstance(value, list):
        return [
            problem
            for number, part in enumerate(value)
            for problem in _unknown_keys(part, arguments[0], f"{place}/{number}")
        ]
    return []
