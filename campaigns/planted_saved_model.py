"""The planted bugs of SavedModels: what becomes of each.

Allowed outcomes are those of :mod:`.planted`. A SavedModel without our manifest stands for another program's. Bugs of
the functions that only ``generate`` calls change tokens and no float, so they have a score of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from campaigns.graph_mutations import Mutant
from campaigns.saved_model_mutations import in_order
from gptconvert.errors import GptConvertError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import cast, transpose
from gptconvert.targets.layout import as_stored
from gptconvert.targets.saved_model import verify as tf_verify
from gptconvert.targets.saved_model.bundle import plan_bundle
from gptconvert.targets.saved_model.plan import DIRECTORY, BuiltGraph, build_graph
from gptconvert.targets.saved_model.process import TensorFlowError
from gptconvert.targets.saved_model.runner import SavedModelRunner
from gptconvert.targets.target import Candidate
from gptconvert.verify.probes import make_probes
from gptconvert.verify.run_probes import whole
from gptconvert.verify.runners import RunError
from gptconvert.verify.stress import settings_of, stress_weights
from tests.targets.saved_model.support import write

#: Relative difference of two float64 runs that rounding explains: constants of the graph, such as tables of rotary
#: angles, stay rounded to float32, so moving all positions by two changes the last of 8 digits.
EXACT = 1e-7
#: Pattern of a mutant's name → why outputs need not show it in a SavedModel without our manifest.
TOO_SMALL: Mapping[str, str] = {
    r"\* 1\.00001$": "a part in 100,000 of a small part of a sum is below the limit of 4 roundings",
    r"^(while_)?cond_true/": "of what is drawn, only a few draws at the limits of top_k and temperature are compared",
}
#: Names of functions that only ``generate`` calls.
OF_GENERATE = re.compile("generate|while_|cond_")
Arrays = dict[str, Any]


@dataclass(frozen=True)
class CorrectSavedModel:
    """A correct SavedModel.

    Attributes:
        family: of the model.
        checkpoint: what it was made of.
        message: its SavedModel message.
        built: what TensorFlow built.
        again: the same graph, built once more: its functions have other numbers.
        order: all mutants; any part of them is a sample.
        folder: holds the directories to verify and run, by name of the weights.
        outputs: of the correct graph, by name of the weights and whether they are in float64.
    """

    family: str
    checkpoint: Checkpoint
    message: Any
    built: BuiltGraph
    again: bytes
    order: list[Mutant]
    folder: Path
    outputs: dict[tuple[str, bool], list[Arrays | None]] = field(default_factory=dict)
    target = "tf"

    @classmethod
    def of(cls, family: str, checkpoint: Checkpoint, folder: Path, seed: int) -> CorrectSavedModel:
        """Export a checkpoint; its variables are written when they are needed first."""
        from tensorflow.core.protobuf import saved_model_pb2

        stored = {name: as_stored(name, weight)[0] for name, weight in checkpoint.weights.items()}
        first, second = (build_graph(checkpoint, stored, xla=False) for _ in range(2))
        message = saved_model_pb2.SavedModel.FromString(first.saved_model)
        order = in_order(message, seed)
        return cls(family, checkpoint, message, first, second.saved_model, order, folder)

    def scored_as(self, mutant: Mutant) -> str:
        """The score that a mutant counts for."""
        return f"tf, {self.family}" + (", text of generate" if OF_GENERATE.match(mutant.name) else "")

    def mutated(self, mutant: Mutant | None) -> Any:
        """The SavedModel message with a bug."""
        message = _copy(self.message)
        if mutant is not None:
            mutant.plant(message)
        return message

    def write(self, mutant: Mutant | None, setting: str = "", double: bool = False) -> Path:
        """The directory with a bug."""
        message = self.mutated(mutant)
        if double:
            in_float64(message)
        path = self.folder / f"{setting or 'own'}{', float64' if double else ''}" / DIRECTORY
        if not path.exists():
            values = {n: cast(w, np.dtype(np.float64)) if double else w for n, w in self._weights(setting).items()}
            write(path.parent, plan_bundle(f"{DIRECTORY}/variables", values, lambda _: self.built))
        (path / "saved_model.pb").write_bytes(message.SerializeToString(deterministic=True))
        return path

    def _weights(self, setting: str) -> Mapping[str, LazyTensor]:
        """The weights as stored: the checkpoint's, or stress weights in their place."""
        weights, config = self.checkpoint.weights, self.checkpoint.config
        stored = {name: as_stored(name, weight) for name, weight in weights.items()}
        if not setting:
            return {name: weight for name, (weight, _) in stored.items()}
        (chosen,) = (each for each in settings_of(config) if each.name == setting)
        values = stress_weights(config, {name: weight.shape for name, weight in weights.items()}, chosen)
        return {name: transpose(value) if stored[name][1] else value for name, value in values.items()}


def _copy(message: Any) -> Any:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def outcome_of(export: CorrectSavedModel, mutant: Mutant) -> str:
    """What becomes of a mutant."""
    own = caught_as_own(export, mutant)
    try:
        found = caught_as_foreign(export, mutant)
    except Exception as error:  # anything but our own errors is a fault of the verifier
        return f"escaped: {type(error).__name__}: {str(error)[:200]}"
    if found == "cannot run":
        return found
    if found == "nothing":
        if agrees(export, mutant, 0):
            return "equal"
        if agrees(export, mutant, EXACT):
            return "equal but for rounding"
        reason = next((why for pattern, why in TOO_SMALL.items() if re.search(pattern, mutant.name)), None)
        if reason is None:
            return "survived: as another program's"
        found = f"too small to see: {reason}"
    else:
        found = f"caught by {found}"
    return found if own else "survived: as our own"


def caught_as_own(export: CorrectSavedModel, mutant: Mutant) -> bool:
    """Whether the comparison with the graph that this version builds finds a bug."""
    from gptconvert.targets.saved_model.graph_differences import differences

    return bool(differences(type(export.message).FromString(export.again), export.mutated(mutant)))


def caught_as_foreign(export: CorrectSavedModel, mutant: Mutant) -> str:
    """What finds a bug without our manifest; ``cannot run`` or ``nothing``."""
    path = export.write(mutant)
    try:
        candidate = Candidate("tf", str(path), path.name, export.checkpoint)
        report = tf_verify.SavedModelVerifier()(candidate, "default", _no_stage)
    except GptConvertError:
        return "cannot run"
    if not report.weights.ok or report.problems:
        return "weights"
    failed = [run for run in report.runs if not run.ok]
    if not failed:
        return "nothing"
    problems = [problem for group in failed[0].groups if not group.ok for problem in group.problems or [""]]
    if all("run failed" in problem for problem in problems):
        return "cannot run"
    return "stress weights" if failed[0].stressed else "outputs"


def _no_stage(name: str, total: int) -> Callable[[int], None]:
    return lambda count: None


def agrees(export: CorrectSavedModel, mutant: Mutant, tolerance: float) -> bool:
    """Whether a mutant computes the same as the correct graph, with stress weights too.

    ``tolerance`` is relative and for float64; 0 compares the bits of float32.
    """
    double = tolerance > 0
    for name in ("", *(setting.name for setting in settings_of(export.checkpoint.config))):
        if (name, double) not in export.outputs:
            export.outputs[name, double] = list(outputs_of(export, None, name, double))
        pairs = zip(export.outputs[name, double], outputs_of(export, mutant, name, double), strict=True)
        if not all(_same(right, wrong, tolerance) for right, wrong in pairs):
            return False
    return True


def _same(a: Arrays | None, b: Arrays | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(_close(a[name], b[name], tolerance) for name in a)


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if not tolerance or a.shape != b.shape or a.dtype.kind != "f":
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return bool(np.abs(a - b).max(initial=0) <= tolerance * np.abs(a).max(initial=0))


class _Double:
    """Runs a SavedModel that computes in float64."""

    def __init__(self, tensorflow: Any) -> None:
        self.tensorflow = tensorflow

    def run(self, signature: str, inputs: Mapping[str, Any], wanted: tuple[str, ...] = ()) -> Arrays:
        wide = {n: np.asarray(a, np.float64 if a.dtype.kind == "f" else None) for n, a in inputs.items()}
        outputs: Arrays = self.tensorflow.run(signature, wide, wanted)
        return outputs


def outputs_of(
    export: CorrectSavedModel, mutant: Mutant | None, setting: str, double: bool
) -> Iterator[Arrays | None]:
    """The outputs of all signatures on random inputs, of real tokens; None where the run fails."""
    config = export.checkpoint.config
    with tf_verify.TensorFlowProcess() as process:
        process.ask("load", path=str(export.write(mutant, setting, double)))
        tensorflow: Any = _Double(process) if double else process
        runner = SavedModelRunner(tensorflow, config)
        for probe in make_probes(config, kv_cache=True, free_positions=True, level="full", seed=20260101):
            new = probe.attention_mask[:, probe.past_length :].astype(bool)
            try:
                outputs = whole(runner, probe, config)
                named = {name: array[new] for name, array in outputs.named.items()}
            except (RunError, IndexError):
                yield None
                continue
            presents = (array for pair in outputs.presents for array in pair)
            yield {**named, **{f"present {i}": array for i, array in enumerate(presents)}}
        for signature, inputs in _others(config.vocab_size):
            try:
                yield tensorflow.run(signature, inputs)
            except TensorFlowError:
                yield None


def _others(vocabulary: int) -> Iterator[tuple[str, Arrays]]:
    """Inputs for the signatures that probes do not run."""
    numbers = np.random.default_rng(1)
    for length, seed in ((7, 0), (30, 1)):
        mask = np.ones((4, length), np.int64)
        mask[1, : length // 2], mask[2, length - length // 2 :] = 0, 0
        prompts = {"input_ids": numbers.integers(0, vocabulary, mask.shape), "attention_mask": mask}
        yield "serving_int32", {name: array.astype(np.int32) for name, array in prompts.items()}
        yield "last_logits", prompts
        for temperature, top_k, steps in ((0.0, 0, 8), (1.0, 0, 12), (0.5, 3, 1), (1.5, 97, 20)):
            chosen = {"max_new_tokens": np.int64(steps), "top_k": np.int64(top_k), "seed": np.int64(seed)}
            yield "generate", {**prompts, **chosen, "temperature": np.float32(temperature)}


def in_float64(message: Any) -> None:
    """Change every float32 of a message to float64: types, and the content of constants."""
    import tensorflow as tf
    from google.protobuf.message import Message

    single, double = int(tf.float32.as_datatype_enum), int(tf.float64.as_datatype_enum)
    if message.DESCRIPTOR.name == "TensorProto":
        if message.dtype == single:
            message.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(message).astype(np.float64)))
        return
    for descriptor, value in message.ListFields():
        if descriptor.enum_type is not None and descriptor.enum_type.name == "DataType":
            if isinstance(value, int):
                setattr(message, descriptor.name, double if value == single else value)
            else:
                value[:] = [double if each == single else each for each in value]
        elif descriptor.message_type is not None:
            several = value.values() if hasattr(value, "values") and not isinstance(value, Message) else value
            for each in [value] if isinstance(value, Message) else several:
                if isinstance(each, Message):
                    in_float64(each)
