"""Loads the artifact of an export, and checks that it fits the export's documents and the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from gptconvert.errors import InputError, UsageError
from gptconvert.generation.directory import CONFIG, TOKENIZER, Exported
from gptconvert.model.generation import SpecialIds
from gptconvert.targets.context import MOST
from gptconvert.targets.registry import RUNTIMES, target_named
from gptconvert.targets.target import Runtime


def first_ids(exported: Exported) -> list[int]:
    """The token that begins a text; GPT-2 begins each after the end of another."""
    special, most = exported.special, exported.vocab_size
    ids = (token for token in (special.bos, *special.eos) if token is not None)
    first = [token for token in ids if token >= 0 and (most is None or token < most)][:1]
    if not first:
        raise UsageError("the prompt is empty, and the model has no token to start with")
    return first


def check_ids(ids: Sequence[int], exported: Exported, vocabulary: int | None) -> None:
    """Refuse a prompt with ids that the model lacks: its tokenizer is another model's."""
    if ids and vocabulary is not None and max(ids) >= vocabulary:
        raise InputError(
            "the tokenizer gives the prompt an id that the model does not have",
            path=exported.path(TOKENIZER),
            expected=f"ids below {vocabulary}",
            found=max(ids),
            hint="put the tokenizer of this model there",
        )


def vocabulary_of(exported: Exported, loaded: Runtime) -> int:
    """The number of ids, on which config.json and the artifact must agree."""
    stated, found = exported.vocab_size, loaded.vocab_size
    if stated is not None and found is not None and stated != found:
        path, hint = exported.path(CONFIG), "config.json and the model belong to different checkpoints"
        raise InputError(
            "vocab_size is not that of the model", path=path, expected=f"{found} ids", found=stated, hint=hint
        )
    return found or stated or MOST


def notes_on(special: SpecialIds, vocabulary: int) -> tuple[str, ...]:
    """Notes on end tokens that the model lacks."""
    outside = sorted(set(special.eos) - set(special.stops(vocabulary)))
    shown = f"{', '.join(map(str, outside[:5]))}{', …' if len(outside) > 5 else ''}"
    note = f"the text does not end at eos_token_id {shown}: the model has {vocabulary} ids"
    return (note,) if outside else ()


def runtime_of(exported: Exported, runtime: str, variant: str | None) -> Runtime:
    """The artifact, run by ``runtime``: a key of ``RUNTIMES``."""
    if runtime not in RUNTIMES:
        raise UsageError("no such runtime", item="--runtime", expected=f"one of {', '.join(RUNTIMES)}", found=runtime)
    load = target_named(RUNTIMES[runtime]).load
    if load is None:
        raise UsageError(f"{RUNTIMES[runtime]} exports cannot be run", item="--runtime")
    if variant is None:
        return load(exported.directory, exported.config)
    if runtime != "onnx":
        raise UsageError(
            f"--variant has no effect with --runtime {runtime}",
            hint="drop one of the options: variants are ONNX graphs",
        )
    from gptconvert.targets.onnx.run import VARIANTS, OnnxRuntime

    if variant not in VARIANTS:
        raise UsageError("no such variant", item="--variant", expected=f"one of {', '.join(VARIANTS)}", found=variant)
    return OnnxRuntime(exported.directory, exported.config, variant)
