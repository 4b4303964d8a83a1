"""The alert rules as the Prometheus operator takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import yaml

RULES: Final = Path(__file__).parent.parent.parent / "manifests" / "monitoring" / "kvray.rules.yaml"
_HEAD: Final = """\
# kvray.rules.yaml for the Prometheus operator, made of it by `python -m tools.monitoring`. Add the labels that your
# Prometheus selects rules by.
"""


def prometheus_rule(rules: str) -> str:
    """Return a PrometheusRule manifest with the groups of `rules`, a rules file's text."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "kvray", "labels": {"app.kubernetes.io/part-of": "kvray"}},
        "spec": yaml.safe_load(rules),
    }
    return _HEAD + yaml.safe_dump(manifest, sort_keys=False, width=1000)
