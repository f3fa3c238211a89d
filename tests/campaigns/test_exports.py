"""A few cases of the campaign on exports, and that it finds what is planted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from campaigns import exports
from campaigns.export_mutations import KINDS
from campaigns.exports import make_export, run_case
from campaigns.report import Report
from gptconvert.errors import InputError, UnforeseenError
from tests.commands import tree

CASES = 15


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_export(tmp_path_factory.mktemp("made"))


@pytest.mark.slow
def test_damaged_exports_give_our_errors(made: tuple[Path, Path]) -> None:
    report = Report("exports", 0)
    for number in range(CASES):
        report.add(run_case(2026, number, *made))
    assert report.failures == []
    assert report.outcomes["exit 3"] > CASES / 10
    assert report.outcomes["ok"] > CASES / 10


@pytest.mark.parametrize(
    ("planted", "outcome"),
    [
        ((1, "error: OverflowError: cannot fit"), "exit 1: error: OverflowError: cannot fit"),
        ((3, "error: thread panicked at src/lib.rs:3"), "exit 3: error: thread panicked at src/lib.rs:3"),
        ((3, f"hint: {exports.UNFORESEEN}"), f"exit 3: hint: {exports.UNFORESEEN}"),
        (KeyError("logits"), "escaped: KeyError: 'logits'"),
        ((3, "error: damaged"), "exit 3"),
        ((0, ""), "ok"),
    ],
)
def test_outcomes(made: tuple[Path, Path], planted: Any, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(*_: object) -> Any:
        if isinstance(planted, Exception):
            raise planted
        return planted

    monkeypatch.setattr(exports, "USES", {"generate torch": (1, use)})
    case = run_case(0, 0, *made)
    assert (case.outcome, case.failed) == (outcome, outcome not in ("ok", "exit 3"))


def test_only_verify_may_exit_with_5(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, failed in (("verify", False), ("tokenizer", True)):
        monkeypatch.setattr(exports, "USES", {name: (1, lambda *_: (5, "differs"))})
        assert run_case(0, 0, *made).failed == failed


@pytest.mark.parametrize("error", [UnforeseenError("cannot be read", hint=exports.UNFORESEEN), InputError("damaged")])
def test_errors_of_the_tokenizer_step(
    made: tuple[Path, Path], error: InputError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(exports, "tokenizer_files", fail)
    monkeypatch.setattr(exports, "USES", {"tokenizer": (1, exports._convert_tokenizer)})
    monkeypatch.setattr(exports, "mutate_export", lambda *_: "nothing")
    case = run_case(0, 0, *made)
    assert case.failed == isinstance(error, UnforeseenError), case


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "saved model"])
def test_mutations_are_seeded_and_change_something(made: tuple[Path, Path], kind: str, tmp_path: Path) -> None:
    import shutil

    def damaged(seed: int, folder: Path) -> Any:
        shutil.copytree(made[1], folder)
        what = KINDS[kind](random.Random(seed), folder)
        files = {path.name for path in folder.rglob("*")}
        readable = not any(path.is_fifo() or path.is_symlink() for path in folder.rglob("*"))
        return what, files, tree(folder) if readable else None

    original = {path.name for path in made[1].rglob("*")}, tree(made[1])
    changed = 0
    for seed in range(8):
        first, second = damaged(seed, tmp_path / f"{seed}a"), damaged(seed, tmp_path / f"{seed}b")
        assert first == second
        changed += first[1:] != original
    assert changed >= 6
