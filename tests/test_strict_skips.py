"""The plugin that makes an unplanned skip a failure."""

from __future__ import annotations

import pytest

from tests.helpers import ROOT
from tests.strict_skips import ALLOWED, allowed_here

pytest_plugins = ["pytester"]

pytestmark = pytest.mark.slow

TESTS = """
import pytest

def test_allowed():
    pytest.skip("planned")

def test_not_allowed():
    {}

@pytest.mark.xfail
def test_expected_to_fail():
    assert False
"""


@pytest.fixture(autouse=True)
def _plugin_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(pytester: pytest.Pytester, body: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(TESTS.format(body))
    allowed = pytester.maketxtfile(allowed="# comment\nplanned\nof old ; python_version < '3'\n")
    arguments = ("-p", "tests.strict_skips", "--allowed-skips", str(allowed), *arguments)
    return pytester.runpytest_subprocess(*arguments) if "2" in arguments else pytester.runpytest_inprocess(*arguments)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unplanned_skip_fails_the_run_and_is_named(pytester: pytest.Pytester, workers: str) -> None:
    result = run(pytester, 'pytest.skip("no reason at all")', "--strict-skips", "-n", workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*not in allowed_skips.txt*", "*test_not_allowed: no reason at all"])
    result.stdout.no_fnmatch_line("*test_allowed*")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_module_that_skips_itself_is_named(pytester: pytest.Pytester, workers: str) -> None:
    pytester.makepyfile(test_other="import pytest\npytest.importorskip('no_such_module')")
    result = run(pytester, "pass", "--strict-skips", "-n", workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["test_other.py: could not import 'no_such_module'*"])


def test_planned_skips_and_expected_failures_pass(pytester: pytest.Pytester) -> None:
    assert run(pytester, "pass", "--strict-skips").ret == pytest.ExitCode.OK


def test_a_reason_for_other_environments_does_not_count(pytester: pytest.Pytester) -> None:
    assert run(pytester, 'pytest.skip("of old")', "--strict-skips").ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(("value", "ret"), [("true", 1), ("", 0)])
def test_ci_is_strict_and_a_developers_machine_is_not(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, value: str, ret: int
) -> None:
    monkeypatch.setenv("CI", value)
    assert run(pytester, 'pytest.skip("no reason at all")').ret == ret


def test_the_list_is_readable() -> None:
    assert "needs root" in allowed_here(ALLOWED.read_text().splitlines())
