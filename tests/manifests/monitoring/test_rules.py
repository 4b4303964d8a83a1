"""The alert rules: each fires when it should, alone, and keeps silent when what happens is just not enough."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests.monitoring.alert_cases import CASES, WATCHED, Case
from tools.monitoring.metrics_page import described, metrics_page
from tools.monitoring.prometheus_rule import RULES, prometheus_rule
from tools.monitoring.vllm_names import SAME

ROOT = RULES.parent.parent.parent
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (prometheus)")


def rules() -> dict[str, dict[str, Any]]:
    """All alert rules by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def history(case: Case, series: dict[str, str], alerts: list[dict[str, Any]]) -> dict[str, Any]:
    """A test of promtool's: all that fires then is these alerts."""
    watched = {name: values for name, values in WATCHED.items() if name != case.replaces}
    names = [alert["labels"]["alertname"] for alert in alerts]
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in (watched | series).items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": case.at,
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
            }
        ],
        "alert_rule_test": [
            {
                "eval_time": case.at,
                "alertname": alert["labels"]["alertname"],
                "exp_alerts": [
                    {
                        "exp_labels": {key: value for key, value in alert["labels"].items() if key != "alertname"},
                        "exp_annotations": alert["annotations"],
                    }
                ],
            }
            for alert in alerts
        ],
    }


def fired(name: str, case: Case) -> dict[str, Any]:
    """The alert as it fires, its annotations filled in."""
    rule = rules()[name]
    labels = {"alertname": name, **rule["labels"], **case.labels}
    annotations = {
        key: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda met: labels.get(met[1], ""), text)
        for key, text in rule["annotations"].items()
    }
    return {"labels": labels, "annotations": annotations}


def test_every_alert_has_a_case_and_every_case_an_alert():
    assert list(CASES) == list(rules())


@needs_promtool
def test_every_alert_fires_alone_and_keeps_silent_below_its_threshold(tmp_path):
    tests = []
    for name, case in CASES.items():
        tests += [history(case, case.fires, [fired(name, case)]), history(case, case.silent, [])]
    path = tmp_path / "rules_test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", path)


@needs_promtool
def test_a_history_in_which_something_else_fires_is_not_passed(tmp_path):
    """The test above can fail: promtool takes a name that no rule has for one that keeps silent."""
    case = CASES["KvrayNoRoad"]
    path = tmp_path / "rules_test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [history(case, case.fires, [])]}))
    with pytest.raises(AssertionError, match="KvrayNoRoad"):
        promtool("test", "rules", path)


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_rules():
    assert f"SUCCESS: {len(CASES)} rules found" in promtool("check", "rules", RULES)


def metric_names(expression: str) -> set[str]:
    return {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\bkvray_\w+", expression)}


def test_rules_speak_of_metrics_that_there_are():
    assert {name for rule in rules().values() for name in metric_names(rule["expr"])} <= described().keys()


def test_rules_say_how_bad_it_is_and_where_to_read_on():
    for name, rule in rules().items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["annotations"].keys() == {"summary", "runbook"}, name
        assert rule["annotations"]["runbook"] == f"docs/RUNBOOK.md#{name.lower()}"


def test_the_manifest_is_made_of_the_rules():
    manifest = RULES.parent / "prometheus-rule.yaml"
    assert manifest.read_text() == prometheus_rule(RULES.read_text()), "python -m tools.monitoring writes it"


def test_the_page_of_metrics_is_made_of_what_is_counted():
    assert (ROOT / "docs" / "METRICS.md").read_text() == metrics_page(), "python -m tools.monitoring writes it"


def test_what_is_said_for_vllms_names_is_counted():
    assert len({one.theirs for one in SAME}) == len(SAME)
    assert {name for one in SAME for name in metric_names(one.ours)} <= described().keys()
