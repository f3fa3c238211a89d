"""LoRA adapters as PEFT saves them: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

Every key of the configuration is read, known not to affect the merged weights, or refused by name if it is set. The
ranks and the trained modules come from the tensors; the configuration supplies the scale of each update.
Source: peft ``LoraConfig``, and the rules by which peft names, saves and loads tensors.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptconvert.containers.json import read_json_object
from gptconvert.containers.safetensors import read_safetensors
from gptconvert.containers.torch import read_torch
from gptconvert.containers.untrusted import entries, no_such_path
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.lora import Adapter, Update
from gptconvert.model.tensors import LazyTensor
from gptconvert.sources.tokenizer_files import HUGGING_FACE, find_tokenizer

ADAPTER_CONFIG = "adapter_config.json"
#: The note on an adapter next to a model, which is not merged.
LEFT_BEHIND = "left behind: the LoRA adapter next to the weights; merge it by passing its directory as --adapter DIR"
#: In the order in which peft prefers them.
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
#: Files that mark a tokenizer; without one, the base's tokenizer is used.
VOCABULARIES = ("tokenizer.json", "vocab.json")
MAX_CONFIG = 16 << 20

#: Keys that select the modules to train or the method of training, which the tensors already reflect.
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core "
    "peft_version qalora_group_size revision runtime_config target_modules target_modules_to_tie task_type "
    "velora_config".split()
)
HANDLED = frozenset(
    "alpha_pattern bias ensure_weight_tying init_lora_weights lora_alpha lora_bias modules_to_save peft_type r "
    "rank_pattern use_dora use_rslora".split()
)
#: Initial values that leave the base's weights unchanged; others, such as PiSSA's, subtract from them.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
_OFF: tuple[object, ...] = (None, False, {}, [], "")
_MERGE_WITH_PEFT = "merge it with peft's model.merge_and_unload(), save the result and convert that"

_TENSOR = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
#: Name components that peft inserts between a module and its own parameters.
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
#: Longest pattern for module names, and the most quantifiers in it: patterns come from untrusted files.
_MAX_PATTERN, _MAX_QUANTIFIERS = 500, 3
#: Longest module name that is matched: the effort grows with its fourth power.
_MAX_MODULE = 120
#: Patterns for module names, and the number for each.
Patterns = tuple[tuple[re.Pattern[str], float], ...]


def is_adapter(names: Collection[str]) -> bool:
    """Whether a directory with these files holds a PEFT adapter."""
    return ADAPTER_CONFIG in names or any(name in names for name in ADAPTER_WEIGHTS)


def adapter_directory(path: str) -> str:
    """The directory of a local adapter, given by itself or by one of its files.

    Raises:
        InputError: the path does not exist, or holds no adapter.
    """
    if not os.path.lexists(path):
        raise no_such_path(path)
    directory = path if os.path.isdir(path) else os.path.dirname(path) or "."
    names = entries(directory, files_only=True)
    if not is_adapter(names):
        raise InputError(
            "no LoRA adapter in this directory",
            path=directory,
            expected=f"{ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}",
            found=", ".join(names[:8]) or "no files",
        )
    return directory


def read_adapter(directory: str) -> Adapter:
    """Read a LoRA adapter's configuration and the headers of its tensors.

    Raises:
        InputError: files are missing or damaged, or tensors are incomplete or unexpected; lists all of them.
        UnsupportedError: another kind of adapter, or a variant of LoRA that is not implemented.
        UnsafeInputError: as the readers of the weights.
    """
    names = entries(directory, files_only=True)
    weights = next((name for name in ADAPTER_WEIGHTS if name in names), None)
    for name, present in ((ADAPTER_CONFIG, ADAPTER_CONFIG in names), (ADAPTER_WEIGHTS[0], weights is not None)):
        if not present:
            found = ", ".join(names[:8]) or "no files"
            raise InputError(f"the adapter's {name} is missing", path=directory, found=found)
    path = os.path.join(directory, ADAPTER_CONFIG)
    settings = _read_settings(read_json_object(path, MAX_CONFIG, ADAPTER_CONFIG), path)
    file = os.path.join(directory, str(weights))
    stored = read_safetensors(file) if file.endswith(".safetensors") else read_torch(file)
    updates, replaced = _sort(stored, settings, file)
    own = any(name in names for name in VOCABULARIES)
    return Adapter(
        path=directory,
        config_path=path,
        stored=stored,
        updates=updates,
        replaced=replaced,
        targets=settings.targets,
        saved=settings.saved,
        keeps_tying=settings.keeps_tying,
        base=settings.base,
        tokenizer=find_tokenizer([directory], HUGGING_FACE) if own else {},
    )


def lone_adapter(directory: str, names: Collection[str], repo: str | None = None) -> InputError:
    """The error for an adapter given without the model that it changes; names that model if the adapter does.

    Args:
        directory: of the adapter.
        names: its files.
        repo: the repository, if it came from a hub.

    Raises:
        UnsupportedError: an adapter of another kind than LoRA.
    """
    path = os.path.join(directory, ADAPTER_CONFIG)
    raw = read_json_object(path, MAX_CONFIG, ADAPTER_CONFIG) if ADAPTER_CONFIG in names else {"peft_type": "LORA"}
    _require_lora(raw, path)
    base = _base(raw)
    return InputError(
        "this is a LoRA adapter (PEFT), not a model: it changes the weights of a base model",
        path=repo or directory,
        expected=f"its base model, {base}" if base else "its base model, which the adapter does not name",
        hint=f"pass the LoRA adapter's base model: --base {shlex.quote(base or 'DIR_OR_REPO')}",
    )


@dataclass(frozen=True)
class _Settings:
    """The configuration.

    Attributes:
        rank: of modules that no pattern matches.
        alpha: likewise.
        ranks: by pattern; the first that matches the end of a module's name counts.
        alphas: likewise.
        by_root: whether the scale is alpha / √r instead of alpha / r.
        dora: whether every update has a magnitude.
        biased: whether every update of a linear layer has a bias.
        targets: as in :class:`Adapter`, like the fields that follow.
    """

    rank: float
    alpha: float
    ranks: Patterns
    alphas: Patterns
    by_root: bool
    dora: bool
    biased: bool
    targets: tuple[str, ...]
    saved: tuple[str, ...]
    keeps_tying: bool
    base: str | None

    def rank_of(self, module: str) -> float:
        """The rank that the configuration gives a module."""
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """The factor of a module's update."""
        alpha = _matching(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _read_settings(raw: Mapping[str, Any], path: str) -> _Settings:
    _require_lora(raw, path)
    _refuse_variants(raw, path)
    chosen = any(raw.get(key) not in _OFF for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    by_pattern = isinstance(raw.get("target_modules"), str)
    return _Settings(
        rank=_number(raw, "r", 8, path),
        alpha=_number(raw, "lora_alpha", 8, path),
        ranks=_patterns(raw, "rank_pattern", path),
        alphas=_patterns(raw, "alpha_pattern", path),
        by_root=_flag(raw, "use_rslora", path),
        dora=_flag(raw, "use_dora", path),
        biased=_flag(raw, "lora_bias", path),
        targets=() if chosen or by_pattern else _names(raw, "target_modules", path),
        saved=_names(raw, "modules_to_save", path),
        keeps_tying=_flag(raw, "ensure_weight_tying", path),
        base=_base(raw),
    )


def _base(raw: Mapping[str, Any]) -> str | None:
    """The name of the base model, if the configuration has it."""
    name = raw.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _require_lora(raw: Mapping[str, Any], path: str) -> None:
    """Refuse the other kinds of PEFT adapters by name."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{kind} adapters are not supported" if kind else "the adapter does not state its kind",
            path=path,
            item="peft_type",
            expected="LORA",
            found=repr(kind)[:80],
            hint=f"if peft can merge this kind, {_MERGE_WITH_PEFT}",
        )


def _refuse_variants(raw: Mapping[str, Any], path: str) -> None:
    """Refuse keys that may change the merged weights in ways that are not implemented."""
    refused = [key for key in sorted(raw) if key not in HARMLESS | HANDLED and raw[key] not in _OFF]
    start = raw.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        refused.append("init_lora_weights")
    if refused:
        listed = ", ".join(f"{key} = {raw[key]!r}"[:100] for key in refused)
        raise UnsupportedError(
            f"this variant of LoRA is not implemented: {listed}", path=path, item=refused[0], hint=_MERGE_WITH_PEFT
        )


def _number(raw: Mapping[str, Any], key: str, default: float, path: str) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or (key == "r" and value < 1):
        raise InputError("wrong value", path=path, item=key, expected="a positive number", found=repr(value)[:80])
    return value


def _flag(raw: Mapping[str, Any], key: str, path: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False):
        raise InputError("wrong value", path=path, item=key, expected="true or false", found=repr(value)[:80])
    return bool(value)


def _names(raw: Mapping[str, Any], key: str, path: str) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise InputError("wrong value", path=path, item=key, expected="a list of names", found=repr(value)[:80])
    return tuple(value)


def _patterns(raw: Mapping[str, Any], key: str, path: str) -> Patterns:
    """Patterns and their numbers; patterns that could take long to match are refused."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise InputError("wrong value", path=path, item=key, expected="an object", found=repr(value)[:80])
    found = []
    for pattern in value:
        number = _number(value, pattern, 0, path)
        slow = len(re.findall(r"[*+?{]", pattern)) > _MAX_QUANTIFIERS or re.search(r"\)[*+{]", pattern)
        compiled = None if slow or len(pattern) > _MAX_PATTERN else _compiled(pattern)
        if compiled is None:
            raise UnsupportedError(
                "this pattern for module names is invalid or too complex",
                path=path,
                item=key,
                found=pattern[:80],
                hint=_MERGE_WITH_PEFT,
            )
        found.append((compiled, number))
    return tuple(found)


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except (re.error, OverflowError):
        return None


def _matching(patterns: Patterns, module: str, default: float) -> float:
    """The number of the first pattern that matches a module's name or its last components, as in peft."""
    if len(module) > _MAX_MODULE:
        return default
    return next((number for pattern, number in patterns if pattern.match(module)), default)


@dataclass
class _Parts:
    """The tensors of one module."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)

    def update(self, module: str, settings: _Settings) -> Update | str:
        """The update, or what is wrong with it."""
        embedding = "lora_embedding_A" in self.tensors or "lora_embedding_B" in self.tensors
        needed = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A.weight", "lora_B.weight"]
        needed += ["lora_magnitude_vector"] if settings.dora else []
        needed += ["lora_B.bias"] if settings.biased and not embedding else []
        missing = [f"  missing     {module}.{name}" for name in needed if name not in self.tensors]
        extra = [f"  unexpected  {module}.{name}" for name in self.tensors if name not in needed]
        if missing or extra:
            return "\n".join([*missing, *extra])
        a, b = (self.tensors[name] for name in needed[:2])
        rank = settings.rank_of(module)
        if len(a.shape) != 2 or a.shape[0] != rank or len(b.shape) != 2 or b.shape[1] != rank:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            return f"  wrong shape {module}: expected rank {rank:g}, found A and B of shape {shapes}"
        magnitude, bias = self.tensors.get("lora_magnitude_vector"), self.tensors.get("lora_B.bias")
        return Update(a, b, settings.scale_of(module, a.shape[0]), embedding, bias, magnitude)


def _sort(
    stored: Mapping[str, LazyTensor], settings: _Settings, path: str
) -> tuple[dict[str, Update], dict[str, LazyTensor]]:
    """The file's tensors as updates by module and replacements by parameter."""
    modules: dict[str, _Parts] = {}
    replaced: dict[str, LazyTensor] = {}
    problems: list[str] = []
    for full, tensor in stored.items():
        name = full.removeprefix("base_model.model.")
        match = _TENSOR.fullmatch(name)
        if match is not None:
            part, leaf = match["part"], match["leaf"]
            key = f"{part}.{leaf}" if leaf and part in ("lora_A", "lora_B") else part
            modules.setdefault(match["module"], _Parts()).tensors[key] = tensor
        elif re.search(r"lora_|token_adapter|(?:^|\.)(?:ia3|hada|lokr|vera|oft|boft)_", name):
            problems.append(f"  unexpected  {full}")
        elif ".original_module." not in name:  # the base's own weights, saved by old versions
            replaced[_WRAPPERS.sub("", name)] = tensor
    updates: dict[str, Update] = {}
    for module, parts in modules.items():
        made = parts.update(module, settings)
        if isinstance(made, str):
            problems.append(made)
        else:
            updates[module] = made
    if problems or not stored:
        raise InputError("\n".join(["the adapter's tensors do not match its configuration", *problems]), path=path)
    return updates, replaced
