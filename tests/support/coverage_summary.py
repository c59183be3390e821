"""A pytest plugin: what `--cov` has measured, the least covered files and the total."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

_LEAST = 10
_SMALL = 20  # statements: shares of fewer say little


def pytest_sessionstart(session: pytest.Session) -> None:
    """Commands that run as forks measure themselves, too (fork_server.measured)."""
    plugin = session.config.pluginmanager.get_plugin("_cov")
    if plugin is not None and plugin.cov_controller is not None:
        os.environ["MERGE_CLI_TEST_COVERAGE"] = "1"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The least covered files, worst first, then the total."""
    plugin = config.pluginmanager.get_plugin("_cov")
    if plugin is None or plugin.cov_controller is None or not (ROOT / ".coverage").exists():
        return
    terminalreporter.section("coverage")
    files, total = measured()
    worst = sorted(files.items(), key=lambda item: (item[1]["percent_covered"], item[0]))
    shown = [item for item in worst if item[1]["num_statements"] >= _SMALL][:_LEAST]
    for name, summary in shown:
        terminalreporter.write_line(
            f"{summary['percent_covered']:5.1f} % of {summary['num_statements']:4} lines  {name}"
        )
    share, lines = total["percent_covered"], total["num_statements"]
    terminalreporter.write_line(f"{share:5.1f} % of {lines} lines in {len(files)} files")


def measured() -> tuple[dict[str, Any], Any]:
    """The numbers of each file and of all."""
    from coverage import Coverage

    coverage = Coverage(data_file=ROOT / ".coverage")
    coverage.load()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        coverage.json_report(outfile=str(path))
        report = json.loads(path.read_text())
    return {name: about["summary"] for name, about in report["files"].items()}, report["totals"]
