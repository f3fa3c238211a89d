"""Fault injection: a call to the operating system fails, once or from there on, in commands that read and write.

Allowed are success and exit code 3 if the call concerned the input, 6 if it concerned the output or a limit of the
machine; where a library hides the error (``os.path.exists``), also 2, 3, 4 and 7, as if the file were absent. The
message gives the reason. The output is the old one or the new one, what else is left is named in the message, nothing
is left when the faults end, and no file stays open.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from campaigns.commands import Tree, leftovers, tree, workspace, write_old
from campaigns.report import Case, Report
from campaigns.shim import Call, Shim
from gptconvert.cli import run as run_command
from gptconvert.publish.staging import clean_up_again

#: Error → what the message must contain.
ERRORS = {
    **{code: os.strerror(code) for code in (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS)},
    errno.EMFILE: "too many open files",
    errno.ENOMEM: "out of memory",
}
LIMITS = (errno.EMFILE, errno.ENOMEM)
COPIES = ("copy_file_range", "sendfile")
BOTH = ("--to", "onnx", "--to", "safetensors")
#: Name → arguments after ``convert SOURCE -o OUTPUT``; None for ``verify``.
SCENARIOS: dict[str, tuple[str, ...] | None] = {
    "one target": ("--to", "onnx", "--no-verify"),
    "two targets, verified": BOTH,
    "force": (*BOTH, "--no-verify", "--force"),
    "missing parents": (*BOTH, "--no-verify"),
    "verify": None,
}


@dataclass(frozen=True)
class Done:
    """What a command did.

    Attributes:
        code: exit code.
        messages: stderr.
        old: the output before.
        published: the output after.
        left: other names in its directory.
        open: number of files that stay open.
        retried: what is left after the faults ended and removing it was tried again.
    """

    code: int
    messages: str
    old: Tree
    published: Tree
    left: tuple[str, ...]
    open: int
    retried: tuple[str, ...]


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over."""
    report, end = Report("faults", seed, next=start), time.monotonic() + seconds
    if only is not None:
        report.add(run_case(seed, only))
        return report
    while time.monotonic() < end:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # threads do not survive forks
            for case in pool.apply(_cases, (seed, report.next, end)):
                report.add(case)
    return report


def _cases(seed: int, first: int, end: float, most: int = 500) -> list[Case]:
    cases = [run_case(seed, first)]
    while time.monotonic() < end and len(cases) < most:
        cases.append(run_case(seed, first + len(cases)))
    return cases


def run_case(seed: int, number: int) -> Case:
    """Run a command with one call failing, or all calls from one on."""
    dice = random.Random(f"{seed}:{number}")
    name = dice.choice(list(SCENARIOS))
    calls, _ = expected(name)
    return run_fault(number, name, dice.randrange(len(calls)), dice.choice(list(ERRORS)), once=dice.random() < 0.5)


def run_fault(number: int, name: str, at: int, code: int, *, once: bool) -> Case:
    """Run a scenario in which the call number ``at`` fails with ``code``."""
    shim = Shim((lambda n: n == at) if once else (lambda n: n >= at), code)
    return run_shim(number, name, shim, "once" if once else "from then on")


def run_shim(number: int, name: str, shim: Shim, when: str) -> Case:
    """Run a scenario under a shim."""
    started = time.process_time()
    with workspace() as root:
        done = perform(root, name, shim)
        problem = _problem(root, name, shim, done) if shim.failed else None
    where = shim.failed[0] if shim.failed else Call("no call", "", "")
    what = f"{name}: {errno.errorcode[shim.code]} {when} at {where.name} in {where.line}"
    outcome = f"exit {done.code}" if problem is None else f"{problem}: exit {done.code}, {done.messages!r}"[:1500]
    return Case(number, what, outcome, time.process_time() - started, problem is not None)


@functools.cache
def expected(name: str) -> tuple[list[Call], Tree]:
    """The calls of a scenario without faults, and what it publishes."""
    shim = Shim()
    with workspace() as root:
        done = perform(root, name, shim)
    if done.code:
        raise RuntimeError(f"{name}: {done.messages}")
    return shim.calls, done.published


def perform(root: Path, name: str, shim: Shim) -> Done:
    """Run the command of a scenario under a shim."""
    extra, source = SCENARIOS[name], str(root / "source")
    output = root / "out" / "a" / "b" if name == "missing parents" else root / "out"
    arguments = ["convert", source, "-o", str(output), *(extra or ())]
    if extra is None:
        _call(["convert", source, "-o", str(root / "artifact"), "--to", "safetensors", "--no-verify"])
        arguments = ["verify", source, str(root / "artifact" / "model.safetensors")]
    if "--force" in arguments:
        write_old(output)
    old, before = tree(output), _open_files()
    with shim.active():
        code, messages = _call(arguments)
    published, left = tree(output), leftovers(root, "artifact")
    retried = clean_up_again()  # as at exit
    gc.collect()  # tracebacks keep mapped files
    opened = len(_open_files() - before)
    retried += leftovers(root, "artifact")
    return Done(code, messages, old, published, tuple(left), opened, tuple(retried))


def _open_files() -> set[tuple[str, str]]:
    """(descriptor, path) of every open file on disk; other descriptors may come and go with libraries' threads."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.startswith("/dev/shm/") or (path.startswith("/") and not path.startswith(("/dev/", "/proc/"))):
                found.add((descriptor, path))
    return found


def _call(arguments: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(arguments)
    return code, err.getvalue()


def _problem(root: Path, name: str, shim: Shim, done: Done) -> str | None:
    """Which promise is broken; None if none is."""
    call, new = shim.failed[0], expected(name)[1]
    hidden = (2, 3, 4, 7) if call.line.startswith(("genericpath", "posixpath")) else ()
    if done.code not in _allowed_codes(root, shim, hidden):
        return "wrong exit code"
    if "a bug in gptconvert" in done.messages:
        return "blames gptconvert"
    if done.code == 6 and not hidden and ERRORS[shim.code] not in done.messages:
        return "no reason"
    aside = "could not be moved back" in done.messages
    if done.published not in ((done.old, new) if done.code else (new,)) and not aside:
        return "partial output"
    if done.code and done.published == new != done.old and "is published" not in done.messages:
        return "publication not stated"
    unnamed = [path for path in done.left if path not in done.messages]
    if unnamed:
        return f"leftovers not named ({', '.join(unnamed)})"
    if done.retried:
        return f"leftovers ({', '.join(done.retried)})"
    return f"{done.open} files stay open" if done.open > 0 else None


def _allowed_codes(root: Path, shim: Shim, hidden: tuple[int, ...]) -> tuple[int, ...]:
    call = shim.failed[0]
    if len(shim.failed) > 1:
        return (0, 3, 6, *hidden)
    is_input = call.path.startswith((str(root / "source"), str(root / "artifact")))
    if shim.code in LIMITS or call.name in COPIES:
        return (0, 6, *hidden)
    return (0, 3, *hidden) if is_input or not call.path else (0, 6, *hidden)
