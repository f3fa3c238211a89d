"""The error for tensors that do not match the configuration, and what to do about each kind of mismatch."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gptconvert.errors import InputError
from gptconvert.model.names import collapse
from gptconvert.model.tensors import Shape

#: Size of the configuration → its keys in configuration files, the most common first.
SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size", "n_vocab"),
    "n_ctx": ("max_position_embeddings", "n_positions", "n_ctx", "block_size"),
    "n_inner": ("intermediate_size", "n_inner"),
    "n_layer": ("num_hidden_layers", "num_layers", "n_layer"),
    "tied_head": ("tie_word_embeddings",),
}
_OTHER_MODEL = "the configuration and the weights belong to different models, or the file is incomplete"
_EMPTY = (
    "these tensors are empty: DeepSpeed ZeRO stage 3 saved them without gathering the weights; merge the training "
    "checkpoint with zero_to_fp32.py, or set stage3_gather_16bit_weights_on_model_save and save the model again"
)
_TRANSPOSED = (
    "these weights are transposed, as in programs that use nn.Linear instead of Conv1D (minGPT, nanoGPT): transpose "
    "the attention and MLP weights, or save {'model': STATE_DICT, 'model_args': {...}} as nanoGPT does and run "
    "`gptconvert nanogpt` on it"
)
#: Why a setting could be right; ``{key}`` and ``{value}`` are the setting's.
_REASONS: Mapping[str, str] = {
    "tied_head": "if the head shares the embedding's weights",
    "n_layer": "to convert all {value} layers of the file",
}
#: Patterns listed in one hint.
_MOST = 4


@dataclass(frozen=True)
class Cause:
    """A way of storing weights in parts.

    Attributes:
        pattern: regular expression found in the names of the parts.
        hint: how to get whole weights.
    """

    pattern: str
    hint: str


#: The first match wins.
CAUSES: tuple[Cause, ...] = (
    Cause(
        r"\.(base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.",
        "a LoRA adapter is stored with the model, unmerged: merge it with peft's model.merge_and_unload(), save the "
        "result and convert that; or save the adapter alone and pass it to the base model with --adapter DIR",
    ),
    Cause(
        r"\.weight_(orig|mask)\Z",
        "the weights are stored with pruning masks: call torch.nn.utils.prune.remove(module, 'weight') on each "
        "pruned module, and save the weights again",
    ),
    Cause(
        r"(?s)\.(weight_[gv]|parametrizations\..+)\Z",
        "the weights are stored as parametrisations, such as weight_norm: call "
        "torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) and save the weights again",
    ),
)


#: Most names of one kind that a message lists; most names, and longest, among which a similar one is sought.
MAX_LISTED, MAX_COMPARED = 100, 200


class MismatchError(InputError):
    """Tensors that are missing, unexpected or mis-shaped; lists all of them.

    Args:
        missing: names in the file.
        unexpected: names in the file.
        misshaped: name, expected and found shape.
        path: the checkpoint.
        fit: the one size of the configuration, and its value, with which every shape fits.
        untied: whether the configuration has a language-model head of its own.
        layers: of the configuration.
    """

    def __init__(
        self,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshaped: Sequence[tuple[str, Shape, Shape]],
        *,
        path: str | os.PathLike[str] | None = None,
        fit: tuple[str, int] | None = None,
        untied: bool = False,
        layers: int = 0,
    ) -> None:
        super().__init__("\n".join(_lines(missing, unexpected, misshaped)), path=path, hint=_OTHER_MODEL)
        #: The setting that resolves the mismatch: a field of GPTConfig and its value.
        self.setting: tuple[str, int | bool] | None = None
        cause = next((c for c in CAUSES if any(re.search(c.pattern, name) for name in unexpected)), None)
        if misshaped and all(0 in found for _, _, found in misshaped):
            self.hint = _EMPTY
        elif cause is not None:
            self.hint = cause.hint
        elif misshaped and not missing and all(shape == found[::-1] for _, shape, found in misshaped):
            self.hint = _TRANSPOSED
        elif fit is not None:
            self.setting = fit
        elif not unexpected and not misshaped and untied and [*map(_last, missing)] in (["lm_head"], ["embed_out"]):
            self.setting = ("tied_head", True)
        elif not missing and not misshaped:
            self._explain_unexpected(unexpected, layers)

    def _explain_unexpected(self, unexpected: Sequence[str], layers: int) -> None:
        found = [re.search(r"\.(\d{1,9})\.", name) for name in unexpected]
        last = layers + len({match[1] for match in found if match})
        if all(found) and {int(match[1]) for match in found if match} == {*range(layers, last)}:
            self.setting = ("n_layer", last)
            patterns = dict.fromkeys(f"{match.string[: match.end()]}*" for match in found if match)
            if len(patterns) <= _MOST:
                self.hint = f"to leave them out: {_ignoring(patterns)}"
            return
        patterns = dict.fromkeys(re.sub(r"\{[^{}]*\}", "*", name) for name in collapse(unexpected))
        if len(patterns) > _MOST:
            patterns = dict.fromkeys(f"{name.partition('.')[0]}.*" for name in patterns)
        known = f"; if the outputs do not depend on them, leave them out: {_ignoring(patterns)}"
        self.hint = "the model has no such tensors" + (known if len(patterns) <= _MOST else "")

    def explain(self, config: Mapping[str, object]) -> None:
        """Add the setting that resolves the mismatch to the hint, under its name in this configuration file."""
        if self.setting is None:
            return
        field, value = self.setting
        names = SIZE_KEYS[field]
        key = next((name for name in names if name in config), names[0] if "model_type" in config else None)
        if key is None:
            return
        why = _REASONS.get(field, "the tensors have the shapes of {key} = {value}: if the configuration is outdated")
        other = "" if self.hint in (None, _OTHER_MODEL) else f"; {self.hint}"
        self.hint = f"{why.format(key=key, value=value)}, pass --set {key}={json.dumps(value)}{other}"


def _ignoring(patterns: Iterable[str]) -> str:
    return " ".join(f"--ignore-tensor {shlex.quote(pattern)}" for pattern in patterns)


def _last(name: str) -> str:
    """The module of a tensor: ``transformer.lm_head.weight`` → ``lm_head``."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _lines(
    missing: Collection[str], unexpected: Collection[str], misshaped: Collection[tuple[str, Shape, Shape]]
) -> list[str]:
    """What is wrong, one line for each name with the layer numbers folded."""
    lines, absent, strange = ["the tensors do not match the configuration"], collapse(missing), collapse(unexpected)
    close = [name for name in strange[:MAX_COMPARED] if len(name) <= MAX_COMPARED]  # difflib takes quadratic time
    for name in absent[:MAX_LISTED]:
        near = difflib.get_close_matches(name, close, 1, 0.75)
        lines.append(f"  missing     {name}" + (f"   (did you mean {near[0]}?)" if near else ""))
    lines += [f"  unexpected  {name}" for name in strange[:MAX_LISTED]]
    more = {"missing": len(absent) - MAX_LISTED, "unexpected": len(strange) - MAX_LISTED}
    lines += [f"  {what}: {count} more" for what, count in more.items() if count > 0]
    by_shape: dict[tuple[Shape, Shape], list[str]] = {}
    for name, expected, found in misshaped:
        by_shape.setdefault((expected, found), []).append(name)
    for (expected, found), names in by_shape.items():
        lines += [f"  wrong shape {name}: expected {list(expected)}, found {list(found)}" for name in collapse(names)]
    return lines
