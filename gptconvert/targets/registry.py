"""The list of targets. A target's module is imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from gptconvert.errors import UnsupportedError, UsageError, install_hint

if TYPE_CHECKING:  # the command line reads the names below, and must start fast
    from gptconvert.model.checkpoint import Checkpoint
    from gptconvert.targets.target import Target

#: ``--to`` name → module that defines its ``TARGET``.
TARGETS: Mapping[str, str] = {
    "onnx": "gptconvert.targets.onnx.target",
    "safetensors": "gptconvert.targets.safetensors.target",
    "tf": "gptconvert.targets.saved_model.target",
    "openai-tf": "gptconvert.targets.openai_tf.target",
    "gguf": "gptconvert.targets.gguf.target",
    "tflite": "gptconvert.targets.tflite.target",
}
#: ``--runtime`` name → the target whose artifact it runs.
RUNTIMES: Mapping[str, str] = {
    "onnx": "onnx",
    "tf": "tf",
    "torch": "safetensors",
    "gguf": "gguf",
    "tflite": "tflite",
}


@cache
def _imported(module: str) -> Target:
    target: Target = importlib.import_module(module).TARGET
    return target


def target_named(name: str) -> Target:
    """A target by its ``--to`` name.

    Raises:
        UsageError: no such target.
    """
    check_names([name])
    return _imported(TARGETS[name])


def check_names(names: Iterable[str]) -> None:
    """Check the names of targets, without importing them.

    Raises:
        UsageError: no such target.
    """
    for name in names:
        if name not in TARGETS:
            raise UsageError(
                f"invalid value of targets: no target {name!r}",
                item="--to",
                expected=f"one of {', '.join(TARGETS)}",
                found=name,
            )


def targets_for(names: Iterable[str], checkpoint: Checkpoint) -> list[Target]:
    """The targets of these names, each checked to be able to write the checkpoint.

    Raises:
        UsageError: no such target.
        UnsupportedError: a package is missing, or the format cannot express the family.
    """
    targets = [target_named(name) for name in dict.fromkeys(names)]
    for target in targets:
        _require(target, checkpoint)
    return targets


def _require(target: Target, checkpoint: Checkpoint) -> None:
    for module, extra in target.requires:
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(f"--to {target.name} needs the package {module}", hint=install_hint(extra))
    if target.families and checkpoint.config.family not in target.families:
        reason = target.refused.get(checkpoint.config.family)
        raise UnsupportedError(
            f"{checkpoint.config.family} cannot be written as {target.title}" + (f": {reason}" if reason else ""),
            expected=f"one of {', '.join(sorted(target.families))}",
            found=checkpoint.config.family,
        )
