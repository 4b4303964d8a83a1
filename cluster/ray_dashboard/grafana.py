"""A dashboard for Grafana, of the form that Ray's own have, so that Ray's UI can show it in a frame.

The first row is of the gauges that reach Prometheus by Ray (`kvrouter.gauges`), the second of what the HTTP endpoint
counts itself, where Prometheus reads its /metrics too.
"""

from __future__ import annotations

import json
from typing import Any, Final

UID: Final = "kvrayCache"
_TITLE: Final = "kvray: cache placement"
_HOLDERS: Final = 'SessionName=~"$SessionName",node=~"$node",role=~"$role"'
_SESSION: Final = 'SessionName=~"$SessionName"'
_BASE: Final = "data_grafana_dashboard_base.json"  #: of Ray's; its own panels and variables are left out

#: Title, what it shows, Grafana's unit, and the queries with their legends.
_Panel = tuple[str, str, str, list[tuple[str, str]]]
_PLACEMENT: Final[list[_Panel]] = [
    (
        "KV held by tier",
        "Bytes of KV blocks that the router knows, over all holders",
        "bytes",
        [(f"sum by (tier) (ray_kvray_placement_held_bytes{{{_HOLDERS}}})", "{{tier}}")],
    ),
    (
        "How full memory is",
        "Share of each holder's memory for KV that holds blocks",
        "percentunit",
        [
            (
                f"ray_kvray_placement_held_bytes{{{_HOLDERS}}} "
                f"/ on (holder, tier) ray_kvray_placement_capacity_bytes{{{_HOLDERS}}}",
                "{{holder}} {{tier}}",
            )
        ],
    ),
    (
        "Where prompts' KV came from",
        "Prompt tokens of answered requests in a second, by source",
        "short",
        [(f"sum by (source) (ray_kvray_placement_prompt_tokens_per_second{{{_SESSION}}})", "{{source}}")],
    ),
    (
        "Share of prompt tokens that nobody computed",
        "Of answered requests, over the last period",
        "percentunit",
        [
            (
                f'1 - sum(ray_kvray_placement_prompt_tokens_per_second{{{_SESSION},source="computed"}}) '
                f"/ sum(ray_kvray_placement_prompt_tokens_per_second{{{_SESSION}}})",
                "not computed",
            )
        ],
    ),
    (
        "Queue before prefill",
        "Seconds that a new prompt waits at each worker",
        "s",
        [(f"ray_kvray_placement_queue_seconds{{{_HOLDERS}}}", "{{holder}}")],
    ),
    (
        "Predicted time to first token",
        "Of 1,024 tokens that nobody holds: the best worker, and the worst one",
        "s",
        [
            (f"min(ray_kvray_placement_predicted_ttft_seconds{{{_HOLDERS}}})", "best"),
            (f"max(ray_kvray_placement_predicted_ttft_seconds{{{_HOLDERS}}})", "worst"),
        ],
    ),
    (
        "Sequences",
        "Running, and waiting to be admitted",
        "short",
        [
            (f"sum(ray_kvray_placement_sequences_running{{{_HOLDERS}}})", "running"),
            (f"sum(ray_kvray_placement_sequences_waiting{{{_HOLDERS}}})", "waiting"),
        ],
    ),
    (
        "Holders that the router does not follow",
        "It waits for what they have; should be none for more than seconds",
        "short",
        [(f"sum by (holder) (ray_kvray_placement_out_of_step{{{_HOLDERS}}})", "{{holder}}")],
    ),
    (
        "Hottest prefixes: requests",
        "By rank, each request counting half every ten minutes; which they are the placement page tells",
        "short",
        [(f"ray_kvray_placement_hot_prefix_requests{{{_SESSION}}}", "rank {{rank}}")],
    ),
    (
        "Hottest prefixes: holders of their head",
        "Copies, by rank: many are memory that could hold something else",
        "short",
        [(f"ray_kvray_placement_hot_prefix_holders{{{_SESSION}}}", "rank {{rank}}")],
    ),
]
_ENDPOINT: Final[list[_Panel]] = [
    (
        "Time to first token",
        "Of answered requests",
        "s",
        [
            (
                f"histogram_quantile({quantile}, "
                "sum by (le) (rate(kvray_time_to_first_token_seconds_bucket[$__rate_interval])))",
                f"p{round(100 * quantile)}",
            )
            for quantile in (0.5, 0.9, 0.99)
        ],
    ),
    (
        "Pulled, by road",
        "Bytes of KV in a second",
        "Bps",
        [("sum by (road) (rate(kvray_transfer_bytes_total[$__rate_interval]))", "{{road}}")],
    ),
    (
        "Transfers that failed, by road",
        "In a second",
        "short",
        [("sum by (road) (rate(kvray_transfers_failed_total[$__rate_interval]))", "{{road}}")],
    ),
    (
        "Evicted blocks, by role",
        "In a second: content that made room",
        "short",
        [("sum by (role) (rate(kvray_blocks_evicted_total[$__rate_interval]))", "{{role}}")],
    ),
]
#: Name, label, the gauge whose series tell its values.
_VARIABLES: Final = (
    ("SessionName", "SessionName", "ray_kvray_placement_held_bytes"),
    ("node", "node", "ray_kvray_placement_held_bytes"),
    ("role", "role", "ray_kvray_placement_held_bytes"),
)


def dashboard_json() -> str:
    """Return the dashboard's JSON, made by what the Ray that is installed makes its own with."""
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory
    from ray.dashboard.modules.metrics.dashboards.common import DashboardConfig, Panel, Row, Target

    def row(title: str, first_id: int, panels: list[_Panel]) -> Any:
        made = [
            Panel(
                id=first_id + number,
                title=name,
                description=description,
                unit=unit,
                # Ray's factory formats what it is given.
                targets=[Target(expr=_escaped(expr), legend=legend) for expr, legend in queries],
                fill=0 if unit in ("s", "percentunit") else 10,
                stack=unit in ("bytes", "Bps"),
            )
            for number, (name, description, unit, queries) in enumerate(panels, 1)
        ]
        return Row(title=title, id=first_id, panels=made)

    config = DashboardConfig(
        name="KVRAY",
        default_uid=UID,
        standard_global_filters=[],
        base_json_file_name=_BASE,
        rows=[
            row("Placement", 1, _PLACEMENT),
            row("HTTP endpoint (Prometheus reads its /metrics)", 100, _ENDPOINT),
        ],
    )
    text, _ = factory._generate_grafana_dashboard(config)  # noqa: SLF001 - as Ray's own dashboards are made
    document = json.loads(text)
    datasource = next(one for one in document["templating"]["list"] if one["name"] == "datasource")
    document |= {
        "title": _TITLE,
        "tags": ["kvray"],
        "refresh": "10s",
        "templating": {"list": [datasource, *(_variable(*one) for one in _VARIABLES)]},
    }
    return json.dumps(document, indent=2)


def _escaped(expr: str) -> str:
    return expr.replace("{", "{{").replace("}", "}}")


def _variable(name: str, label: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": "${datasource}",
        "definition": query,
        "query": {"query": query, "refId": f"{name}Variable"},
        "includeAll": True,
        "allValue": ".*",
        "multi": name != "SessionName",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "options": [],
        "skipUrlSync": False,
    }
