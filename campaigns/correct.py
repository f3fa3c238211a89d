"""Correct exports: convert random models to every target, verified, and search for false alarms.

Allowed are success; refusal as unsupported (exit code 4) before anything is written; and exit code 3 if the
checkpoint itself overflows, in the reference model or in the type asked for. A third of the outputs are verified
again, as ``gptconvert verify`` does, which also compares our own graphs node for node. Processes run the cases on all
cores, each with one TensorFlow for many cases, without limits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from unittest import mock

import numpy as np

from campaigns.models import Model, random_model
from campaigns.report import Case, Report
from gptconvert.errors import GptConvertError
from gptconvert.model.options import GGUF_QUANTISED, GGUF_TYPES, TFLITE_QUANTISED, TFLITE_TYPES, Options
from gptconvert.pipeline import convert, verify_export
from gptconvert.targets.gguf.layout import ARCHITECTURES, why_not
from gptconvert.targets.openai_tf.plan import FIXED, TASKS, TOKENIZER_NAMES
from gptconvert.targets.saved_model import plan as tf_plan
from gptconvert.targets.saved_model import verify as tf_verify
from gptconvert.targets.saved_model.process import TensorFlowProcess
from gptconvert.targets.tflite import build as tflite_build
from gptconvert.targets.tflite.build import ConverterProcess

#: Targets → share of the cases. TensorFlow takes five times as long as onnxruntime.
MIXTURE: Mapping[tuple[str, ...], float] = {
    ("onnx",): 0.5,
    ("tflite",): 0.05,
    ("safetensors",): 0.05,
    ("onnx", "safetensors"): 0.05,
    ("openai-tf",): 0.1,
    ("tf",): 0.15,
    ("onnx", "tf"): 0.05,
    ("gguf",): 0.05,
}
#: Share of the outputs that are verified once more, on their own.
AGAIN = 1 / 3
#: Graphs that one TensorFlow builds before it is replaced: it does not free them.
MOST_GRAPHS = 40
#: Options that the description of a model or the targets show.
SHOWN = ("task", "targets")
#: Messages of exit code 3 about a checkpoint that overflows.
OVERFLOWS = ("the checkpoint itself computes NaN or infinity", "overflow")


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over.

    Args:
        seed: of the cases.
        seconds: wall time.
        start: number of the first case.
        only: run this case alone, and print the traceback of its error.
    """
    report, end = Report("correct", seed, next=start), time.monotonic() + seconds
    if only is not None:
        report.add(run_case(seed, only, debug=True))
        return report
    if importlib.util.find_spec("tensorflow") is None:
        report.missing = ["SavedModels, which need TensorFlow"]
    while time.monotonic() < end:
        for case in _in_children(seed, report.next, end):
            report.add(case)
    return report


def _in_children(seed: int, first: int, end: float) -> Iterator[Case]:
    """The outcomes of cases in order, until the time is over or a process dies."""
    workers, number, running = os.cpu_count() or 1, first, deque[tuple[int, Future[Case]]]()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        while running or time.monotonic() < end:
            while len(running) < 2 * workers and time.monotonic() < end:
                running.append((number, pool.submit(run_case, seed, number)))
                number += 1
            if not running:
                return
            case_number, future = running.popleft()
            try:
                yield future.result()
            except BrokenProcessPool as error:
                yield Case(case_number, str(case(seed, case_number)), f"killed: {error}", 0.0, failed=True)
                return


@dataclasses.dataclass(frozen=True)
class Export:
    """A case: a model, and how to export it.

    Attributes:
        model: the model.
        options: for the conversion.
        again: whether to verify the output once more.
    """

    model: Model
    options: Options
    again: bool

    def __str__(self) -> str:
        usual, given = dataclasses.asdict(Options()), dataclasses.asdict(self.options)
        changed = [f"{key} {value}" for key, value in given.items() if value != usual[key] and key not in SHOWN]
        return f"{self.model}, to {', '.join([*self.options.targets, *changed, *['verified again'] * self.again])}"


def case(seed: int, number: int) -> Export:
    """The case of a number."""
    model, random = random_model(number, seed), np.random.default_rng([number, 2, seed])

    def pick(*values: Any) -> Any:
        return values[random.integers(len(values))]

    shares = np.array(list(MIXTURE.values()))
    targets = list(MIXTURE)[random.choice(len(shares), p=shares / shares.sum())]
    if targets == ("openai-tf",):
        model = expressible(model)
        targets = targets if model.config.family in TOKENIZER_NAMES and model.config.task in TASKS else ("onnx",)
    if targets == ("gguf",) and (model.config.family not in ARCHITECTURES or why_not(model.config)):
        targets = ("onnx",)
    chosen: dict[str, Any] = {"targets": targets, "dtype": pick(None, None, None, "fp32", "fp16", "bf16")}
    if "gguf" in targets:
        chosen["gguf_type"] = (kind := pick(*GGUF_TYPES),)
        if kind in GGUF_QUANTISED:  # what it loses is no fault
            chosen["max_kl"] = 1e9
    if "tflite" in targets:
        chosen["tflite_type"] = (kind := pick(*TFLITE_TYPES),)
        if kind in TFLITE_QUANTISED:
            chosen["max_kl"] = 1e9
    if "onnx" in targets:
        chosen |= {"opset": pick(17, 18, 21, 21), "single_file": pick(False, False, True)}
        chosen["position_ids"] = pick(False, True) if model.options.kv_cache is None else False
    else:
        chosen["kv_cache"] = None
    if "tf" in targets:
        chosen["xla"] = random.random() < 0.05
    chosen["seed"] = pick(0, 0, number + 1)
    options = dataclasses.replace(model.options, **chosen)
    return Export(model, options, random.random() < AGAIN)


def expressible(model: Model) -> Model:
    """The model with what OpenAI's formats imply."""
    config = dataclasses.replace(model.config, n_inner=4 * model.config.n_embd, **dict(FIXED))  # type: ignore[arg-type]
    return dataclasses.replace(model, config=config) if config.family in TOKENIZER_NAMES else model


def run_case(seed: int, number: int, *, debug: bool = False) -> Case:
    """Convert the model of a number and verify it."""
    return run_export(case(seed, number), debug=debug)


def run_export(made: Export, *, debug: bool = False) -> Case:
    """Convert a model and verify it."""
    import torch

    torch.set_num_threads(1)  # models this small lose time waiting for threads
    started = time.process_time()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as root, one_tensorflow():
        outcome, failed = _outcome(made, Path(root), debug)
    return Case(made.model.number, str(made), outcome, time.process_time() - started, failed)


def _outcome(made: Export, root: Path, debug: bool) -> tuple[str, bool]:
    """The outcome of a conversion, as text, and whether it is not allowed."""
    source, output = made.model.write(root / "model"), root / "out"
    try:
        convert(source, output, made.options)
        if made.again:
            return _verified_again(made, source, output)
    except GptConvertError as error:
        if debug:
            traceback.print_exc()
        refused = error.exit_code == 4 and not output.exists()
        overflows = error.exit_code == 3 and any(words in error.message for words in OVERFLOWS)
        outcome = "refused" if refused else "overflows" if overflows else f"exit {error.exit_code}: {error}"
        return outcome, not (refused or overflows)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return f"escaped: {type(error).__name__}: {str(error)[:200]}", True
    return "verified", False


def _verified_again(made: Export, source: Path, output: Path) -> tuple[str, bool]:
    chosen = made.options
    options = Options(task=chosen.task, verify=chosen.verify, seed=chosen.seed, max_kl=chosen.max_kl)
    report = verify_export(source, output, options)
    if report.passed:
        return "verified twice", False
    return f"exit 5: verify failed: {report.table()}", True


class _Shared:
    """A TensorFlow process that outlives each ``with``: importing TensorFlow takes seconds."""

    def __init__(self, kind: type[TensorFlowProcess] = TensorFlowProcess) -> None:
        self.kind, self.graphs = kind, 0
        self.process: TensorFlowProcess | None = None

    def __call__(self, limits: object = None) -> Self:
        return self

    def __enter__(self) -> TensorFlowProcess:
        self.graphs += 1
        if self.graphs > MOST_GRAPHS:
            self.close()
        if self.process is None:
            self.process, self.graphs = self.kind(), 0
        return self.process

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, BaseException):
            self.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


_SHARED, _CONVERTER = _Shared(), _Shared(ConverterProcess)


def one_tensorflow() -> ExitStack:
    """Make planning and verification use one TensorFlow process, and one that converts to LiteRT."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(tflite_build, "ConverterProcess", _CONVERTER))
    for module in (tf_plan, tf_verify):
        stack.enter_context(mock.patch.object(module, "TensorFlowProcess", _SHARED))
    return stack


def close_tensorflow() -> None:
    """End the TensorFlow processes, if there are any."""
    _SHARED.close()
    _CONVERTER.close()
