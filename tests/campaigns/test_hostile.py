"""Hostile files cost processor time and memory in proportion to their size."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from campaigns.hostile import CASES, MEMORY, SECONDS, is_allowed
from tests.helpers import ROOT

#: Cases are measured in forks of this process: pytest's own has threads, which do not survive a fork.
PROGRAM = """
import dataclasses, json
from campaigns.hostile import CASES, measure
print(json.dumps({name: dataclasses.asdict(measure(name, 1)) for name in CASES}))
"""


@pytest.fixture(scope="module")
def costs() -> Any:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_within_the_budget(costs: Any, name: str) -> None:
    cost = costs[name]
    assert is_allowed(cost["outcome"]), cost
    assert cost["seconds"] < SECONDS, cost
    assert cost["memory"] < MEMORY, cost
