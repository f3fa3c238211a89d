"""Coverage-guided fuzzing of the parsers, from the corpus in ``campaigns/corpus/PARSER/``.

A case is a chain: an input of the corpus is changed step by step, and a change that runs lines in an order that
neither the corpus nor the chain has run before becomes the base of the next steps. So a case follows from its seed
and number alone. :mod:`campaigns.judge` defines the allowed outcomes; an input that ends in another is kept in
``campaigns/failures/``.

``python -m campaigns.fuzz --minimise`` explores, and replaces the corpus by a small one that covers the same lines
and the new ones. Coverage is measured with the standard library: atheris, Python's usual fuzzer, takes 35 MB, and its
cases depend on all earlier ones, so that they cannot be repeated by number.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from campaigns import judge
from campaigns.coverage import Arc, traced
from campaigns.mutations import damaged
from campaigns.parsers import CORPUS, PARSERS
from campaigns.report import Case, Report

#: Inputs with an outcome that is not allowed are kept here.
FAILURES = Path(__file__).parent / "failures"
#: Inputs of a case; largest input, in bytes.
STEPS, LARGEST = 24, 1 << 16
#: Inputs that the corpus keeps of each parser.
MOST_KEPT = 20
#: Attempts to shorten an input of the corpus.
ATTEMPTS = 300
#: Processor time with tracing, in seconds, from which on an input is judged again without.
SUSPECT = 1.0


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over; parameters as in :func:`campaigns.mutate.run`."""
    report, end = Report("fuzz", seed, next=start), time.monotonic() + seconds
    names = available()
    report.missing += [f"{name} (needs {PARSERS[name].needs})" for name in PARSERS if name not in names]
    for name in names:
        known(name)  # before the processes that share it are forked
    if only is not None:
        report.add(run_case(seed, only, debug=True))
        return report
    while time.monotonic() < end:
        for case in judge.in_child(run_case, seed, report.next, end):
            report.add(case)
    return report


def available() -> list[str]:
    """The parsers whose packages are installed."""
    return [name for name, p in PARSERS.items() if p.needs is None or importlib.util.find_spec(p.needs)]


def run_case(seed: int, number: int, *, debug: bool = False) -> Case:
    """One chain of inputs of one parser. The outcome is the first that is not allowed."""
    dice = random.Random(f"fuzz:{seed}:{number}")
    name = dice.choice(available())
    originals, seen = corpus(name), set(known(name))
    base, slowest, finds = dice.choice(originals), 0.0, 0
    for step in range(STEPS):
        data = changed(dice, name, base, originals)
        outcome, seconds, arcs = judged(name, data)
        slowest = max(slowest, seconds)
        if not judge.is_allowed(outcome):
            what = f"{name}, step {step}: {kept(name, data)}"
            if debug:
                execute(name, data, debug=True)
            return Case(number, what, outcome, seconds, failed=True, inputs=step + 1)
        if not arcs <= seen:
            base, finds = data, finds + 1
            seen |= arcs
    return Case(number, f"{name}: {finds} finds", "new lines" if finds else "known lines", slowest, inputs=STEPS)


def changed(dice: random.Random, name: str, base: bytes, others: Sequence[bytes]) -> bytes:
    """``base`` with a change, by the format's own mutation or any, or joined with another input."""
    if dice.random() < 0.1:
        other = dice.choice(others)
        return (base[: dice.randint(0, len(base))] + other[dice.randint(0, len(other)) :])[:LARGEST]
    mutation = PARSERS[name].mutation if dice.random() < 0.6 else damaged
    return mutation(dice, base)[:LARGEST]


def judged(name: str, data: bytes) -> tuple[str, float, set[Arc]]:
    """Outcome, processor time and arcs of an input. Time is measured without tracing if it could be too much."""
    arcs = set[Arc]()
    outcome, seconds = execute(name, data, arcs)
    if seconds > SUSPECT or not judge.is_allowed(outcome):
        outcome, seconds = execute(name, data)
    if seconds > judge.MAX_SECONDS and judge.is_allowed(outcome):
        outcome = f"slow: {seconds:.1f} s"
    return outcome, seconds, arcs


def execute(name: str, data: bytes, arcs: set[Arc] | None = None, *, debug: bool = False) -> tuple[str, float]:
    """Outcome and processor time of an input. Its arcs are added to ``arcs``, if given."""
    parser = PARSERS[name]

    def read() -> None:
        with nullcontext() if arcs is None else traced(arcs):
            parser.parse(data, Path(folder))

    with tempfile.TemporaryDirectory(dir=judge.MEMORY_FOLDER) as folder:
        started = time.process_time()
        outcome = judge.outcome_of(read, debug=debug, refusals=parser.refusals)
        return outcome, time.process_time() - started


@functools.cache
def corpus(name: str) -> tuple[bytes, ...]:
    """The committed inputs of a parser."""
    return tuple(path.read_bytes() for path in sorted((CORPUS / name).iterdir()))


@functools.cache
def known(name: str) -> frozenset[Arc]:
    """The arcs of a parser's corpus."""
    for data in corpus(name):
        execute(name, data)  # what runs once in a process, such as imports, is not the input's
    return frozenset().union(*(judged(name, data)[2] for data in corpus(name)))


def kept(name: str, data: bytes) -> str:
    """The path of a file that keeps an input."""
    path = FAILURES / f"{name}-{_digest(data)}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return str(path)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


# --- the corpus -----------------------------------------------------------------------------------------------------


def minimise(name: str, seconds: float, seed: int) -> list[str]:
    """Explore a parser, and rewrite its corpus.

    Returns:
        the outcomes that are not allowed, with the files that keep their inputs.
    """
    present = corpus(name) if (CORPUS / name).is_dir() else ()
    pool, failures = explore(name, [*PARSERS[name].seeds(), *present], seconds, seed)
    arcs = {data: pool[data] for data in cover(pool)}
    for data in list(arcs):
        own = arcs.pop(data)
        short = shortened(name, data, own.difference(*arcs.values()))
        arcs[short] = frozenset(judged(name, short)[2])
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for data in arcs:
        (folder / _digest(data)).write_bytes(data)
    return failures


def explore(
    name: str, seeds: Iterable[bytes], seconds: float, seed: int
) -> tuple[dict[bytes, frozenset[Arc]], list[str]]:
    """Inputs that run lines in new orders, found within the time, with their arcs; and failures."""
    dice, failures = random.Random(f"explore:{seed}:{name}"), list[str]()
    pool = {data: frozenset(judged(name, data)[2]) for data in seeds if len(data) <= LARGEST}
    pool |= {data: frozenset(judged(name, data)[2]) for data in pool}  # what runs once is gone the second time
    seen, end = set[Arc]().union(*pool.values()), time.monotonic() + seconds
    while time.monotonic() < end:
        inputs = list(pool)
        data = changed(dice, name, dice.choice((dice.choice(inputs), inputs[-1])), inputs)
        outcome, _, arcs = judged(name, data)
        if not judge.is_allowed(outcome):
            failures.append(f"{name}: {outcome}: {kept(name, data)}")
        elif not arcs <= seen:
            pool[data] = frozenset(arcs)
            seen |= arcs
    return pool, failures


def cover(pool: dict[bytes, frozenset[Arc]]) -> list[bytes]:
    """Few inputs that together run all arcs of the pool, or as many as :data:`MOST_KEPT` can."""
    chosen: list[bytes] = []
    missing = set[Arc]().union(*pool.values())
    while missing and len(chosen) < MOST_KEPT:
        best = max(pool, key=lambda data: (len(pool[data] & missing), -len(data), data))
        chosen.append(best)
        missing -= pool[best]
    return chosen


def shortened(name: str, data: bytes, needed: Iterable[Arc]) -> bytes:
    """A shorter input that still runs the arcs ``needed``."""
    return shorten(data, lambda shorter: set(needed) <= judged(name, shorter)[2])


def shorten(data: bytes, holds: Callable[[bytes], bool]) -> bytes:
    """``data`` with pieces removed as long as ``holds`` is true, in at most :data:`ATTEMPTS` attempts."""
    attempts, size = ATTEMPTS, max(1, len(data) // 2)
    while attempts > 0:
        start = len(data) - size
        while start >= 0 and attempts > 0:
            shorter = data[:start] + data[start + size :]
            attempts -= 1
            if holds(shorter):
                data = shorter
            start -= size
        if size == 1:
            break
        size = max(1, size // 2)
    return data


def main() -> int:
    """Explore the parsers and rewrite the corpus; 1 after failures."""
    parser = argparse.ArgumentParser(prog="python -m campaigns.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="PARSER", help=f"default: all of {', '.join(PARSERS)}")
    parser.add_argument("--minimise", action="store_true", required=True, help="rewrite the corpus")
    parser.add_argument("--seconds", type=float, default=20, help="time to explore each parser (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in PARSERS]
    if unknown:
        parser.error(f"no such parser: {', '.join(unknown)}")
    failures = []
    for name in given.names or available():
        corpus.cache_clear()
        failures += minimise(name, given.seconds, given.seed)
        files = list((CORPUS / name).iterdir())
        print(f"{name}: {len(files)} inputs, {sum(file.stat().st_size for file in files)} bytes", flush=True)
    print("\n".join(failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
