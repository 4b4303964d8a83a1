"""docs/METRICS.md: every metric with its kind and meaning, and vLLM's names beside ours."""

from __future__ import annotations

from typing import Final

from cluster.fleet_metrics import HELP
from cluster.openai.exposition import family_of
from cluster.openai.metrics import HttpMetrics
from tools.monitoring.vllm_names import SAME

_HEAD: Final = """\
# Metrics

Made by `python -m tools.monitoring` from what is counted; a test holds it to that.

`GET /metrics` of any ingress shows the whole fleet in Prometheus' text format: its own numbers and, at most 1 s old,
those of all other ingresses, the router, the workers and the node caches. So **scrape one target**: the address of
`kvray serve`, or the Service before the ingresses, not every pod behind it. It wants an API key, an operator's where
there are tenants:

```yaml
scrape_configs:
  - job_name: kvray
    authorization: {credentials_file: /etc/prometheus/kvray-key}
    static_configs: [{targets: ["kvray.example:8000"]}]
rule_files: [kvray.rules.yaml]
```

Alert rules: `manifests/monitoring/kvray.rules.yaml`, and the same as a PrometheusRule beside it; what to do about each
is in `docs/RUNBOOK.md`. Labels say who counts: `ingress`, or `worker` with `role` (decode, prefill, cache, router).

With `observability.level: off` ingresses count nothing and have no `/metrics`; what workers know of themselves is in
`kvray status`. `observability.tenant_metrics` says how many tenants are counted by name, the first ones of
`tenants.members`: all others are `other`, and `none` is who has a key of no tenant. At 0, the default, there is no
`kvray_tenant_...`.

What a scrape and counting cost: `benchmarks/observability.py`.
"""
_SAME_HEAD: Final = """
## vLLM's names

Where a dashboard has the left, say the right. Histograms have the same meaning and other buckets.

| vLLM | kvray | |
|---|---|---|
"""
#: Of what workers tell.
_TOLD_HISTOGRAMS: Final = frozenset({"kvray_queue_seconds"})
_ALL_HEAD: Final = """
## All of them

| name | kind | what it is |
|---|---|---|
"""


def described() -> dict[str, str]:
    """Return what each family means, by its name: what the HTTP surface counts, and what the fleet tells."""
    return HELP | HttpMetrics(tenants={}).help_texts()


def metrics_page() -> str:
    """Return the text of docs/METRICS.md."""
    same = [_row(f"`{one.theirs}`", f"`{one.ours}`" if one.ours else "none", one.remark) for one in SAME]
    rows = [_row(f"`{name}`", _kind(name), text) for name, text in sorted(described().items())]
    return "".join([_HEAD, _SAME_HEAD, *same, _ALL_HEAD, *rows])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _kind(name: str) -> str:
    surface = HttpMetrics(tenants={}).registry.collect()
    kinds = {family.name: family.type for family in surface if family.type != "counter"}
    return "histogram" if name in _TOLD_HISTOGRAMS else kinds.get(name, family_of(name, {}).kind)
