"""Write what is made: the PrometheusRule manifest and docs/METRICS.md."""

from __future__ import annotations

from tools.monitoring.metrics_page import metrics_page
from tools.monitoring.prometheus_rule import RULES, prometheus_rule

ROOT = RULES.parent.parent.parent

(RULES.parent / "prometheus-rule.yaml").write_text(prometheus_rule(RULES.read_text()))
(ROOT / "docs" / "METRICS.md").write_text(metrics_page())
