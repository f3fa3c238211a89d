"""Mutation fuzzing of exports: damage copies of one, then generate with it, verify it, or convert its tokenizer.

Damaged are the documents of the directory (``config.json``, ``generation_config.json``, tokenizer files, checksums),
the ONNX graph and the weights; some mutations know what hurts a tokenizer or a runtime. Allowed are success, exit
code 2, 3, 4 or 7 and, for ``verify``, 5, with a message of this project's own: not that of an unforeseen exception,
and no traceback, panic or source line of a library. A case may take :data:`SECONDS` of processor time, each of its
processes :data:`MEMORY` MiB. A child process runs the cases, so that a crash is found too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from campaigns.export_mutations import mutate_export
from campaigns.report import Case, Report
from gptconvert.cli import run as command
from gptconvert.containers.untrusted import boundary
from gptconvert.errors import GptConvertError
from gptconvert.inspection import open_checkpoint
from gptconvert.targets.package.tokenizer import tokenizer_files

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2" / "hf-safetensors"
#: Processor time and memory of a case; importing TensorFlow takes much of its time.
SECONDS, MEMORY, TENSORFLOW_SECONDS = 10.0, 2048.0, 30.0
#: Wall time after which a case is stopped.
LIMIT = 60
END = "<|endoftext|>"
#: Text that only a library would print.
FOREIGN = re.compile(
    r"Traceback|panicked|RUST_BACKTRACE|PanicException|pyo3|ONNXRuntimeError|\.(?:cc|rs|cpp|h):\d+|bug in gptconvert"
)
UNFORESEEN = "report this with the traceback"
#: Prompts: plain, empty, with NUL, long, in other scripts, with special tokens.
PROMPTS = ("the he", "", "a\0b", "he " * 200, "e\u0301 中文 👩‍👩‍👧", END, "a" * 3000, "\x7f\ufeff\n")

#: (the damaged directory, the checkpoint, random choices) → exit code and messages.
Use = Callable[[Path, Path, random.Random], tuple[int, str]]


def make_export(root: Path, targets: Sequence[str] = ("onnx", "safetensors")) -> tuple[Path, Path]:
    """A tiny checkpoint with a tokenizer, and its export, in ``root``."""
    from tokenizers import pre_tokenizers

    source, export = Path(shutil.copytree(FIXTURE, root / "source")), root / "export"
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) != 0x120, ord(c)))[:93]]
    vocabulary = [*symbols, "he", "\u0120t", "\u0120the", END]
    (source / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (source / "merges.txt").write_text("#version: 0.2\nh e\n\u0120 t\n\u0120t he\n")
    words = ["convert", str(source), *(word for target in targets for word in ("--to", target))]
    code, messages = _command([*words, "-o", str(export), "--no-verify", "-q"])
    if code:
        raise RuntimeError(messages)
    return source, export


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over.

    Args:
        seed: of the cases.
        seconds: wall time.
        start: number of the first case.
        only: run this case alone, and print its messages.
    """
    report, end = Report("exports", seed, next=start), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as root:
        tf = ("tf",) if importlib.util.find_spec("tensorflow") else ()
        source, export = make_export(Path(root), ("onnx", "safetensors", *tf))
        if only is not None:
            report.add(run_case(seed, only, source, export, debug=True))
            return report
        while time.monotonic() < end:
            for case in _in_child(seed, report.next, end, source, export):
                report.add(case)
    return report


def _in_child(seed: int, first: int, end: float, source: Path, export: Path) -> Iterator[Case]:
    """The outcomes of cases that one child process runs, until the time is over or it dies."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(seed, first, end, source, export, there))
    child.start()
    there.close()
    running = first
    try:
        while (case := here.recv()) is not None:
            yield case
            running = case.number + 1
    except EOFError:
        child.join()
        yield Case(running, "unknown", f"killed: exit code {child.exitcode}", 0.0, failed=True)
    child.join()


def _child(seed: int, first: int, end: float, source: Path, export: Path, results: Connection) -> None:
    number = first
    while time.monotonic() < end and number < first + 200:
        case = run_case(seed, number, source, export)
        results.send(case)
        number += 1
        if case.outcome.startswith("memory"):
            break  # a new process measures from the start
    results.send(None)


def run_case(seed: int, number: int, source: Path, export: Path, *, debug: bool = False) -> Case:
    """Damage a copy of ``export`` and use it."""
    dice = random.Random(f"{seed}:{number}")
    uses = [name for name in USES if name != "generate tf" or (export / "saved_model").is_dir()]
    use = dice.choices(uses, weights=[USES[name][0] for name in uses])[0]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        folder = Path(shutil.copytree(export, Path(root) / "export"))
        if use != "generate tf":  # verifying it takes too long
            shutil.rmtree(folder / "saved_model", ignore_errors=True)
        what = " + ".join(mutate_export(dice, folder, use) for _ in range(dice.choice((1, 1, 1, 2))))
        before = _seconds()
        with _timer():
            outcome, failed = _outcome(USES[use][1], use, folder, source, dice, debug)
        seconds, memory = _seconds() - before, _memory()
    if seconds > (TENSORFLOW_SECONDS if use == "generate tf" else SECONDS) and not failed:
        outcome, failed = f"slow: {seconds:.1f} s", True
    if memory > MEMORY and not failed:
        outcome, failed = f"memory: {memory:.0f} MiB", True
    return Case(number, f"{use}, {what}", outcome, seconds, failed)


def _outcome(use: Use, name: str, folder: Path, source: Path, dice: random.Random, debug: bool) -> tuple[str, bool]:
    """The outcome as text, and whether it is not allowed."""
    try:
        code, messages = use(folder, source, dice)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"escaped: {type(error).__name__}: {str(error)[:300]}", True
    if debug:
        print(messages)
    allowed = {0, 2, 3, 4, 7, *((5,) if name == "verify" else ())}
    said = messages if code else ""
    if code not in allowed or FOREIGN.search(said) or UNFORESEEN in said:
        return f"exit {code}: {messages.strip()[-500:]}", True
    return f"exit {code}" if code else "ok", False


def _command(words: Sequence[str]) -> tuple[int, str]:
    """Exit code and stderr of a command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(list(words))
    return code, err.getvalue() or out.getvalue()


def _generate(runtime: str) -> Use:
    def use(folder: Path, source: Path, dice: random.Random) -> tuple[int, str]:
        sampled = dice.choice(([], [], ["--temperature", "0.7"], ["--top-p", "0.5"], ["--temperature", "1e-310"]))
        words = ["generate", "--runtime", runtime, "--max-new-tokens", str(dice.choice((1, 3, 50))), *sampled]
        return _command([*words, "--", str(folder), dice.choice((*PROMPTS[:1] * 4, *PROMPTS))])

    return use


def _verify(folder: Path, source: Path, dice: random.Random) -> tuple[int, str]:
    return _command(["verify", str(source), str(folder), "-q"])


def _convert_tokenizer(folder: Path, source: Path, dice: random.Random) -> tuple[int, str]:
    """The tokenizer step of a conversion, with the export as the checkpoint."""
    if dice.random() < 0.4:
        (folder / "tokenizer.json").unlink(missing_ok=True)
    try:
        with boundary(folder, "a tokenizer"):
            tokenizer_files(open_checkpoint(folder))
    except GptConvertError as error:
        return error.exit_code, f"{error}\n{error.hint}"
    return 0, ""


#: Use → how often, and the function.
USES: Mapping[str, tuple[int, Use]] = {
    "generate onnx": (16, _generate("onnx")),
    "generate torch": (8, _generate("torch")),
    "generate tf": (1, _generate("tf")),
    "verify": (3, _verify),
    "tokenizer": (12, _convert_tokenizer),
}


def _seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def _memory() -> float:
    """Peak memory of this process or one of its children, in MiB."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(each).ru_maxrss for each in who) / 1024


@contextlib.contextmanager
def _timer() -> Iterator[None]:
    """Stop the block at the limit."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
