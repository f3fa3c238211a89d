"""SIGINT and SIGTERM end the program with the shell's exit code and leave nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import pytest

from gptconvert.publish import journal, signals
from gptconvert.publish.staging import Staging, clean_up_again
from tests.helpers import ROOT

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ALL = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and child processes inherit that
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    assert [signal.getsignal(number) for number in HANDLED] == before
    signal.signal(signal.SIGHUP, ignored)


@ALL
def test_a_signal_unwinds(number: int, code: int) -> None:
    steps = []
    with pytest.raises(signals.Interrupted) as caught, signals.raising():
        try:
            os.kill(os.getpid(), number)
            steps.append("went on")
        finally:
            steps.append("cleaned up")
    assert steps == ["cleaned up"]
    assert (caught.value.code, caught.value.signum) == (code, number)


def test_second_signal_does_not_interrupt_the_cleanup() -> None:
    steps = []
    with pytest.raises(signals.Interrupted), signals.raising():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("cleaned up")
    assert steps == ["cleaned up"]


@ALL
def test_held_signal_is_delayed(number: int, code: int) -> None:
    steps = []
    with pytest.raises(signals.Interrupted) as caught, signals.raising():
        with signals.held():
            with signals.held():
                os.kill(os.getpid(), number)
                steps.append("inner")
            steps.append("outer")
        steps.append("after")
    assert steps == ["inner", "outer"]
    assert caught.value.code == code


def test_pending_signal_does_not_hide_an_error() -> None:
    with pytest.raises(ZeroDivisionError), signals.raising(), signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError
    with signals.raising(), signals.held():
        pass  # the pending signal was discarded


def test_ignored_signals_stay_ignored() -> None:
    """As under ``nohup`` or in a background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.raising():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_does_nothing_in_other_threads() -> None:
    seen = []

    def work() -> None:
        with signals.raising(), signals.held():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_was_swallowed_stops_publication(tmp_path: Path) -> None:
    """Python ignores exceptions in finalizers, and libraries catch all of them."""
    with pytest.raises(signals.Interrupted), signals.raising(), Staging(tmp_path / "out") as staging:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        staging.publish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scenario", ["new-parents", "replace"])
def test_a_signal_at_any_call_leaves_the_old_output_or_the_new_one(tmp_path: Path, scenario: str) -> None:
    """The signal arrives at the n-th call of a Python function; what was published is recorded."""
    from tests.publishing import OLD, convert, leftovers, prepare, tree

    root = tmp_path / "root"
    checkpoint, output = prepare(root, scenario)
    convert(checkpoint, output)
    new, old = tree(output), OLD if scenario == "replace" else {}
    calls = _Calls()
    with calls.interrupting(-1):
        convert(*prepare(root, scenario))
    total = calls.count
    assert total > 500
    for n in sorted({*range(total - 60, total, 3), *random.Random(scenario).sample(range(total), 12)}):
        checkpoint, output = prepare(root, scenario)
        record, interrupted = journal.begin(), False
        record.entries.clear()
        try:
            with signals.raising(), calls.interrupting(n):
                convert(checkpoint, output)
        except signals.Interrupted:
            interrupted = True
        clean_up_again()
        published = bool(record.values("published"))
        assert published or interrupted, n
        assert tree(output) == (new if published else old), n
        assert not leftovers(root), n


class _Calls:
    """Counts the calls of functions in gptconvert, in the main thread."""

    count = 0

    @contextmanager
    def interrupting(self, at: int) -> Iterator[None]:
        """Raise SIGTERM at call number ``at``."""
        self.count = 0

        def profile(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and "gptconvert" in frame.f_code.co_filename:
                self.count += 1
                if self.count == at + 1:
                    signal.raise_signal(signal.SIGTERM)

        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(None)


#: Convert repeatedly, slowed down by the progress callback.
ENDLESS = """
import sys, time
from pathlib import Path
from gptconvert.publish import signals
from gptconvert.publish.staging import Staging
from gptconvert.publish.writer import write_and_digest
from tests.publishing import plan, prepare

checkpoint, output = prepare(Path(sys.argv[1]), "replace")

def progress(nbytes):
    print("working", flush=True)
    time.sleep(0.05)

with signals.raising():
    with Staging(output, inputs=checkpoint.source.files, force=True) as staging:
        while True:
            write_and_digest(staging.path, plan(checkpoint), checkpoint, progress)
            import shutil, os
            for name in os.listdir(staging.path):
                path = os.path.join(staging.path, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
"""


@ALL
@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, number: int, code: int, delay: float) -> None:
    from tests.publishing import OLD, leftovers, tree

    root = tmp_path / "root"
    command = [sys.executable, "-c", ENDLESS, str(root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        assert leftovers(root)
        time.sleep(delay)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert errors == ""
    assert tree(root / "out") == OLD
    assert not leftovers(root)
