"""The alert rules: each fires when it should, alone, and keeps silent when what happens is just not enough."""

from __future__ import annotations

import re
import shlex
from typing import Any

import msgspec
import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from cluster.cli import app
from cluster.config import KvrayConfig
from tests.manifests.monitoring.alert_cases import CASES, WATCHED, Case
from tests.prometheus import needs_promtool, promtool
from tools.monitoring.metrics_page import described, metrics_page
from tools.monitoring.prometheus_rule import RULES, prometheus_rule
from tools.monitoring.vllm_names import SAME

ROOT = RULES.parent.parent.parent


def rules() -> dict[str, dict[str, Any]]:
    """All alert rules by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


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


@pytest.mark.slow
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


def runbook() -> dict[str, str]:
    """The runbook's entries by name."""
    parts = re.split(r"^## (\w+)\n", (ROOT / "docs" / "RUNBOOK.md").read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_runbook_has_an_entry_for_each_alert_with_symptom_cause_and_command():
    entries = runbook()
    assert list(entries) == list(rules())
    for name, text in entries.items():
        words = re.findall(r"^\*\*(\w+)\.\*\*", text, flags=re.MULTILINE)
        assert words == ["Symptom", "Cause", "Command"], name
        assert re.search(r"^    \S", text, flags=re.MULTILINE), f"{name}: nothing to run"


def test_the_runbook_speaks_of_commands_settings_and_metrics_that_there_are():
    text = (ROOT / "docs" / "RUNBOOK.md").read_text()
    lines = re.findall(r"^    kvray (.+?)(?: \||$)", text, flags=re.MULTILINE)
    assert lines
    for line in sorted(set(lines)):
        words, command = shlex.split(line), get_command(app)
        while isinstance(command, TyperGroup):
            command = command.commands[words.pop(0)]
        command.make_context("kvray", words).close()
    known = config_places()
    sections = {place.partition(".")[0] for place in known}
    named = re.findall(r"`([a-z]+\.[a-z_]+)`", text)
    assert {name for name in named if name.partition(".")[0] in sections} <= known
    assert {name for name in metric_names(text) if name != "kvray"} <= described().keys()


def config_places() -> set[str]:
    return {
        f"{section.name}.{field}"
        for section in msgspec.structs.fields(KvrayConfig)
        for field in section.type.__struct_fields__
    }
