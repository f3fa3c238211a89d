"""Fails the run on an unexpected skip: in CI (``CI=true``), or with ``--strict-skips``.

``allowed_skips.txt`` lists the expected reasons, one per line, each with an optional environment marker after
`` ; ``, as in a requirements file. Without this, a missing package, a missing fixture or a renamed path would turn
tests off unnoticed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.markers import Marker

ALLOWED = Path(__file__).with_name("allowed_skips.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    parser.addoption("--strict-skips", action="store_true", default=in_ci, help="fail on a skip that is not listed")
    parser.addoption("--allowed-skips", default=str(ALLOWED), help="file that lists the reasons")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--strict-skips") and not hasattr(config, "workerinput"):  # reports arrive at the controller
        lines = Path(config.getoption("--allowed-skips")).read_text().splitlines()
        config.pluginmanager.register(StrictSkips(allowed_here(lines)), "strict-skips-reporter")


def allowed_here(lines: Iterable[str]) -> frozenset[str]:
    """The reasons that are expected in this environment."""
    entries = (line.partition(" ; ") for line in lines if line.strip() and not line.startswith("#"))
    return frozenset(reason.strip() for reason, _, marker in entries if not marker or Marker(marker).evaluate())


class StrictSkips:
    """Collects skips whose reason is not allowed, and fails the session if there are any."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed
        self.unexpected: dict[str, str] = {}  # test or module → reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._record(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section("skips that are not in allowed_skips.txt", red=True)
            for test, reason in sorted(self.unexpected.items()):
                terminalreporter.line(f"{test}: {reason}")

    def _record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            if reason not in self.allowed:
                self.unexpected[report.nodeid] = reason
