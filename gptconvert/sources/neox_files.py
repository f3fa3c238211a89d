"""Locate the files of a GPT-NeoX checkpoint: weights of one step, YAML configuration, tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptconvert.containers.untrusted import entries, file_size, read_small
from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.sources.tokenizer_files import first_file

LATEST = "latest"
MAX_LATEST = 4096
#: Weights: one file per layer and rank, or one per rank.
LAYER_FILE = re.compile(r"layer_(\d{1,5})-model_(\d{1,4})-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d{1,4})_model_states\.pt")
_SPLIT_FILE = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_STEP = re.compile(r"global_step(\d{1,18})")
#: The trainer's tokenizer type → canonical file name → (configuration key, usual file names).
TOKENIZERS: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "HFTokenizer": {"tokenizer.json": ("vocab_file", ("20B_tokenizer.json", "tokenizer.json"))},
    "GPT2BPETokenizer": {
        "vocab.json": ("vocab_file", ("gpt2-vocab.json", "vocab.json", "encoder.json")),
        "merges.txt": ("merge_file", ("gpt2-merges.txt", "merges.txt", "vocab.bpe")),
    },
}


@dataclass(frozen=True)
class Located:
    """The files of one step.

    Attributes:
        folder: the step's directory.
        root: the directory of the whole run.
        layers: (layer, rank) → file, if there is one per layer.
        ranks: rank → file; weights are read from these only if ``layers`` is empty.
        notes: choices made to find them.
    """

    folder: str
    root: str
    layers: Mapping[tuple[int, int], str]
    ranks: Mapping[int, str]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All weights files."""
        return tuple(self.layers.values()) or tuple(self.ranks.values())

    def configs(self, hparams: str | None) -> tuple[str, ...]:
        """The YAML files that make up the configuration: ``hparams``, or all in the first directory that has any.

        Raises:
            InputError: none found.
        """
        if hparams is not None:
            return (hparams,)
        places = [os.path.join(p, "configs") for p in (self.folder, self.root)] + [self.folder, self.root]
        for place in places:
            found = [name for name in entries(place, quiet=True) if name.endswith((".yml", ".yaml"))]
            if found:
                return tuple(os.path.join(place, name) for name in found)
        raise InputError(
            "the configuration is missing; only it holds the heads, rotary positions and residual form",
            path=self.root,
            expected="configs/*.yml",
            hint="copy the training run's YAML files into configs/, or pass --hparams FILE",
        )

    def tokenizer(self, config: Mapping[str, object]) -> dict[str, str]:
        """The tokenizer's files, found by their names in the configuration or by their usual names."""
        found = {}
        places = (self.folder, self.root, os.path.join(self.root, "configs"))
        tokenizer_type = str(config.get("tokenizer_type", "GPT2BPETokenizer"))
        for canonical, (key, usual) in TOKENIZERS.get(tokenizer_type, {}).items():
            declared = config.get(key)
            names = [re.split(r"[/\\]", declared)[-1]] if isinstance(declared, str) and declared else []
            paths = (os.path.join(place, name) for name in [*names, *usual] for place in places)
            if (path := first_file(paths)) is not None:
                found[canonical] = path
        return found


def locate(path: str, step: int | None) -> Located:
    """Find the checkpoint at ``path``: the run's directory, a step's directory, or a file in it.

    Raises:
        InputError: no checkpoint, none of that step, or missing files.
        UnsupportedError: weights partitioned by ZeRO stage 3.
        UnsafeInputError: a file that is not a regular file.
        UsageError: the path names one step and ``step`` another.
    """
    if not os.path.isdir(path):
        file_size(path)
        path = os.path.dirname(path) or "."
    names = entries(path)
    if _holds_weights(names):
        name = os.path.basename(os.path.abspath(path))
        if step is not None and _STEP.fullmatch(name) and name != f"global_step{step}":
            hint = "pass the run's directory, or omit --step"
            raise UsageError(f"the path and --step {step} name different checkpoints", path=path, hint=hint)
        return _in_step(path, os.path.dirname(os.path.abspath(path)), ())
    chosen, notes = _choose(path, names, step)
    return _in_step(os.path.join(path, chosen), path, notes)


def looks_like_neox(path: str) -> bool:
    """Whether ``path`` looks like such a checkpoint, judged by file names."""
    if not os.path.isdir(path):
        name = os.path.basename(path)
        return bool(LAYER_FILE.fullmatch(name) or RANK_FILE.fullmatch(name)) and os.path.lexists(path)
    names = entries(path, quiet=True)
    steps = (os.path.join(path, name) for name in names if _STEP.fullmatch(name))
    return _holds_weights(names) or any(_holds_weights(entries(folder, quiet=True)) for folder in steps)


def _in_step(folder: str, root: str, notes: Sequence[str]) -> Located:
    layers: dict[tuple[int, int], str] = {}
    ranks: dict[int, str] = {}
    for name in entries(folder, quiet=True):
        if match := LAYER_FILE.fullmatch(name):
            layers[int(match[1]), int(match[2])] = os.path.join(folder, name)
        elif match := RANK_FILE.fullmatch(name):
            ranks[int(match[1])] = os.path.join(folder, name)
    if not layers and not ranks:
        raise UnsupportedError(
            "the weights are partitioned over data-parallel ranks (ZeRO stage 3)",
            path=folder,
            expected="layer_XX-model_YY-model_states.pt or mp_rank_YY_model_states.pt",
            hint="if you trust the files: weights = deepspeed.utils.zero_to_fp32."
            "get_fp32_state_dict_from_zero_checkpoint(RUN, STEP_FOLDER_NAME); "
            "torch.save({'module': weights}, 'mp_rank_00_model_states.pt') in the step's folder",
        )
    _check_complete(folder, layers, ranks)
    return Located(folder, root, dict(sorted(layers.items())), dict(sorted(ranks.items())), tuple(notes))


def _check_complete(folder: str, layers: Mapping[tuple[int, int], str], ranks: Mapping[int, str]) -> None:
    """Require a file of every rank, for every layer that has any."""
    if layers:
        numbers, width = {layer for layer, _ in layers}, max(rank for _, rank in layers) + 1
        wanted = [(layer, rank) for layer in sorted(numbers) for rank in range(width)]
        missing = [f"layer_{n:02}-model_{r:02}-model_states.pt" for n, r in wanted if (n, r) not in layers]
    else:
        missing = [f"mp_rank_{r:02}_model_states.pt" for r in range(max(ranks)) if r not in ranks]
    if missing:
        listed = ", ".join(missing[:8]) + (f" … ({len(missing)} in all)" if len(missing) > 8 else "")
        raise InputError(
            f"files are missing: {listed}", path=folder, hint="copy all files of the step into one directory"
        )


def _choose(folder: str, names: Sequence[str], step: int | None) -> tuple[str, list[str]]:
    """The step's directory: that of ``step``, or the one ``latest`` names, or the highest."""
    steps = {int(m[1]): n for n in names if (m := _STEP.fullmatch(n)) and _holds_weights(_entries_of(folder, n))}
    if not steps or (step is not None and step not in steps):
        raise InputError(
            "no checkpoint in this directory" if step is None else f"no checkpoint of step {step}",
            path=folder,
            expected="global_stepN with layer_XX-model_YY-model_states.pt or mp_rank_YY_model_states.pt",
            found=", ".join(steps.values()) or ", ".join(names[:8]) or "an empty directory",
        )
    if step is not None:
        return steps[step], []
    latest = None
    if LATEST in names:
        data = read_small(os.path.join(folder, LATEST), MAX_LATEST, "a file that names a directory")
        latest = data.decode("utf-8", "replace").strip()
        if latest in steps.values():
            return latest, []
    chosen = steps[max(steps)]
    notes = [f"latest names {latest}, which is missing: {chosen} was read"] if latest is not None else []
    if len(steps) > 1 and not notes:
        notes = [f"{len(steps)} checkpoints in the directory: {chosen} was read, the highest step"]
    return chosen, notes


def _holds_weights(names: Sequence[str]) -> bool:
    return any(pattern.fullmatch(name) for name in names for pattern in (LAYER_FILE, RANK_FILE, _SPLIT_FILE))


def _entries_of(folder: str, name: str) -> list[str]:
    return entries(os.path.join(folder, name), quiet=True)
