"""A plugin of pytest: a schema that the server refuses by its keyword is a test that is skipped, by that name.

It runs in an environment without kvray; what a model checks beyond what its schema says is not the server's fault.
"""

import re

import pytest

from tests.text.pydantic_models import NOT_PARSED

_REFUSAL = re.compile(r"grammar refused: ([$a-zA-Z]+)(?: at #|: )")

_UNREAD = re.compile("validation error|Invalid JSON when parsing model output|maximum (output )?retries")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Tell refusals from faults."""
    report = yield
    if call.when == "call" and call.excinfo is not None and item.originalname == "test_schemas":
        text = str(call.excinfo.value)
        refusal = _REFUSAL.search(text)
        if refusal is not None:
            report.outcome, report.longrepr = "skipped", (str(item.path), None, f"refused: {refusal[1]}")
        elif item.callspec.params["model"].__name__ in NOT_PARSED and _UNREAD.search(text):
            report.outcome, report.longrepr = "passed", None
    return report
