"""What Grafana would ask a Prometheus for our dashboard."""

from __future__ import annotations

import json
import re

from cluster.ray_dashboard.grafana import dashboard_json


def panels(dashboard: dict) -> list[dict]:
    """Panels of all rows, the rows included."""
    return [panel for row in dashboard["panels"] for panel in (row, *row.get("panels", ()))]


def asked_by_panels() -> list[tuple[str, str]]:
    """Each query of our dashboard, its variables filled in, after a title."""
    return [
        (
            f"{panel['title']} {target['refId']}",
            re.sub(r"\$\w+", ".*", target["expr"].replace("$__rate_interval", "1m")),
        )
        for panel in panels(json.loads(dashboard_json()))
        for target in panel.get("targets", ())
    ]
