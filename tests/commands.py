"""Run the command line in this process and inspect its results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptconvert.cli import run

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "fixtures" / "tiny-gpt2"
ORIGINALS = REPOSITORY / "fixtures" / "originals"
TRAINED = REPOSITORY / "fixtures" / "gpt2-stdlib"
SHARED = REPOSITORY.parent / "shared" / "data"


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(capsys: Any, *args: object) -> Outcome:
    """Run ``gptconvert ARGS``."""
    capsys.readouterr()
    code = run([str(arg) for arg in args])
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def tree(directory: Path) -> dict[str, bytes]:
    """Relative path → content, for every file in a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
