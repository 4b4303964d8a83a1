"""What is wrong with the objects of a kustomization: by their schemas, then by rules that no schema holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.manifests import network_rules, object_rules, ray_rules
from tests.manifests.kustomize import Document
from tests.manifests.objects import Objects
from tests.manifests.schemas import schema_problems
from tests.manifests.serve_config import serve_config_problems

#: Each of them may count on what those before it have nothing to say of.
_RULES: tuple[tuple[Callable[[Objects], Iterator[str]], ...], ...] = (
    (ray_rules.every_group,),
    (object_rules.every_object, object_rules.every_quantity, object_rules.every_selector, object_rules.every_pod),
    (
        network_rules.every_policy,
        network_rules.every_budget,
        network_rules.every_priority,
        network_rules.every_monitor,
        ray_rules.the_service,
        ray_rules.the_cluster,
        ray_rules.the_pools,
        ray_rules.what_ours_needs,
    ),
    (network_rules.closed_pods,),
)


def problems_of(documents: list[Document], beside: list[Document] | None = None) -> list[str]:
    """Return what is wrong, a line each; rules are asked only where the schemas have nothing to say.

    `beside` are objects without problems that are there too, and that `documents` refer to; a RayService is in either.
    """
    problems = [f"{document.get('kind')} {problem}" for document in documents for problem in schema_problems(document)]
    if problems:
        return problems
    objects = Objects([*documents, *(beside or [])])
    problems = serve_config_problems(objects.service["serveConfigV2"])
    for rules in _RULES:
        problems = problems or [problem for rule in rules for problem in rule(objects)]
    return problems
