"""Resolve a path to a TensorFlow checkpoint: a prefix, directory, ``checkpoint`` file, index or data file.

A checkpoint is identified by its *prefix*: ``model.ckpt`` stands for ``model.ckpt.index`` and ``model.ckpt.data-…``.
A directory may hold several, numbered by training step; the text file ``checkpoint`` names the latest, often by its
path on the training machine. Other TensorFlow files are refused by name.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass

from gptconvert.containers.leveldb import MAGIC
from gptconvert.containers.untrusted import entries, explain_bytes, explain_file, file_size, read_small
from gptconvert.errors import GptConvertError, InputError, UnsupportedError, UsageError

STATE_FILE = "checkpoint"
MAX_STATE_BYTES = 16 << 20
SAVED_MODELS = ("saved_model.pb", "saved_model.pbtxt")
_DATA = re.compile(r"(.+)\.data-[0-9]{5}-of-[0-9]{5}", re.DOTALL)
_STEP = re.compile(r"(.*)-([0-9]{1,18})", re.DOTALL)
_LATEST = re.compile(rb"""^[ \t]*model_checkpoint_path\s*:\s*(["'])((?:\\.|(?!\1)[^\\\n])*)\1""", re.MULTILINE)
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{1,2})|([0-7]{1,3})|(.))", re.DOTALL)
_RESAVE = "load it in TensorFlow and save the weights with tf.compat.v1.train.Saver().save(session, PREFIX)"


@dataclass(frozen=True)
class Located:
    """A checkpoint's prefix, and notes on the choices made to find it."""

    prefix: str
    notes: tuple[str, ...] = ()


def locate(path: str, step: int | None = None) -> Located:
    """Resolve ``path`` to a checkpoint.

    Args:
        path: a prefix, a directory, a ``checkpoint`` text file, an index or a data file.
        step: the training step to use; None for the latest.

    Raises:
        InputError: no checkpoint, none of that step, or several with no way to choose.
        UnsupportedError: another kind of TensorFlow file.
        UnsafeInputError: a named pipe, device or socket.
        UsageError: the path names one step and ``step`` another.
    """
    if os.path.isdir(path):
        return _in_directory(path, step)
    data = _DATA.fullmatch(path)
    prefix = data[1] if data else path.removesuffix(".index")
    if os.path.lexists(prefix + ".index"):
        note = (f"{os.path.basename(path)} is one data file of {os.path.basename(prefix)}: all of it was read",)
        return Located(_of_step(prefix, step), note if data else ())
    if os.path.lexists(path) and not data:
        return _from_file(path, step)
    return _absent(prefix, step)


def looks_like_checkpoint(path: str) -> bool:
    """Whether to pass a path to :func:`locate`, which may still refuse it. A cheap check."""
    if os.path.isdir(path):
        names = entries(path, quiet=True)
        state = os.path.join(path, STATE_FILE)
        return bool(_prefixes(names) or _is_state(state) or {*SAVED_MODELS} & {*names} or _runs(path, names))
    if os.path.basename(path) in SAVED_MODELS or path.endswith((".index", ".meta")) or _DATA.fullmatch(path):
        return os.path.lexists(path)
    folder, stem = os.path.split(path)
    siblings = [n for n in entries(folder or ".", quiet=True) if n.startswith(stem)]
    named = {n for n in _prefixes(siblings) if n == stem or _stem(n) == stem}
    return bool(named) or _is_table(path) or _is_state(path)


def _in_directory(folder: str, step: int | None, state: str | None = None) -> Located:
    """The checkpoint of ``step`` in a directory, or the one its state file names, or that of the highest step."""
    names = entries(folder)
    prefixes = _prefixes(names)
    state_path = state or (os.path.join(folder, STATE_FILE) if STATE_FILE in names else None)
    latest, notes = None, []
    if state_path is not None and not os.path.isdir(state_path):
        latest, why = _latest(state_path)
        if latest is None and state is not None:
            raise InputError(
                why,
                path=state_path,
                found=_listed(prefixes) or "no index next to it",
                hint="pass the prefix of one of these checkpoints"
                if prefixes
                else "copy the .index and .data files next to it",
            )
        notes += [f"{os.path.basename(state_path)}: {why}"] if latest is None else []
    if latest is not None and os.path.dirname(latest) and step is None:
        return Located(os.path.join(folder, latest))
    if not prefixes:
        return _in_only_run(folder, names, step)
    chosen, how = _choose(folder, prefixes, step, latest)
    if len(prefixes) > 1:
        notes.append(f"{len(prefixes)} checkpoints in the directory ({_listed(prefixes)}): {chosen} was read, {how}")
    return Located(os.path.join(folder, chosen), tuple(notes))


def _choose(folder: str, prefixes: list[str], step: int | None, latest: str | None) -> tuple[str, str]:
    """The prefix to read, and the reason for the choice."""
    steps = {name: int(match[2]) for name in prefixes if (match := _STEP.fullmatch(name))}
    if step is not None:
        fitting = [name for name in steps if steps[name] == step]
        same_stem = [name for name in fitting if latest is not None and _stem(name) == _stem(latest)]
        if len(fitting) == 1 or len(same_stem) == 1:
            return (same_stem or fitting)[0], "as requested"
        present = ", ".join(map(str, sorted({*steps.values()})))
        what = (
            f"several checkpoints of step {step}: {_listed(fitting)}" if fitting else f"no checkpoint of step {step}"
        )
        raise InputError(
            what,
            path=folder,
            found=f"steps {present}" if steps else "no numbered checkpoint",
            hint="pass the prefix of one of them"
            if fitting
            else ("pass one of these steps, or omit --step" if steps else "omit --step"),
        )
    if latest in prefixes:
        return latest, "the one named in the checkpoint file"
    if len(prefixes) == 1:
        return prefixes[0], "the only one"
    if len(steps) < len(prefixes) or len({_stem(name) for name in prefixes}) > 1:
        raise InputError(
            "several checkpoints in this directory",
            path=folder,
            expected="one",
            found=_listed(prefixes),
            hint="pass the prefix of one of them" + (", or --step N" if steps else ""),
        )
    return max(steps, key=lambda name: steps[name]), "the highest step"


def _in_only_run(folder: str, names: Collection[str], step: int | None) -> Located:
    """The checkpoint in the only subdirectory that has any: ``checkpoint/run1`` of a fine-tuning tool."""
    _refuse_saved_model(folder, names)
    runs = _runs(folder, names)
    if len(runs) > 1:
        raise InputError(
            "several directories with checkpoints, and none directly in this one",
            path=folder,
            found=_listed(runs),
            hint="pass one of these directories",
        )
    if not runs:
        raise _nothing(folder, names)
    inner = _in_directory(os.path.join(folder, runs[0]), step)
    return Located(inner.prefix, (f"{runs[0]} was read, the only run in the directory", *inner.notes))


def _from_file(path: str, step: int | None) -> Located:
    """A single file that is neither an index nor a data file."""
    file_size(path)  # refuses pipes and devices before anything is opened
    folder, name = os.path.split(path)
    _refuse_saved_model(folder, [name])
    if path.endswith(".meta"):
        raise _meta_alone(path)
    if _is_table(path):
        raise _version_1(path)
    if name == STATE_FILE or _is_state(path):
        return _in_directory(folder or ".", step, state=path)
    explained = explain_file(path)
    raise InputError(
        f"this file {explained}" if explained else "not a TensorFlow checkpoint",
        path=path,
        expected="a prefix (model.ckpt), a directory, a checkpoint file, an .index or a .data file",
    )


def _absent(prefix: str, step: int | None) -> Located:
    """Resolve a prefix without an index: use a numbered checkpoint, or raise an error that says what is missing."""
    folder, stem = os.path.split(prefix)
    names = entries(folder or ".", quiet=True)
    numbered = [name for name in _prefixes(names) if name != stem and _stem(name) == stem]
    if numbered:
        latest = _latest(os.path.join(folder, STATE_FILE))[0] if STATE_FILE in names else None
        chosen, how = _choose(folder or ".", numbered, step, latest)
        note = f"{stem} matches {_listed(numbered)}: {chosen} was read, {how}"
        return Located(os.path.join(folder, chosen), (note,))
    data = next((name for name in names if name.startswith(stem + ".data-") and _DATA.fullmatch(name)), None)
    if data is not None:
        raise _index_missing(prefix, data)
    if stem + ".meta" in names:
        raise _meta_alone(prefix + ".meta")
    for name in names:
        if re.fullmatch(re.escape(stem) + r"-[0-9]{5}-of-[0-9]{5}", name) and _is_table(os.path.join(folder, name)):
            raise _version_1(os.path.join(folder, name))
    raise InputError(
        "no such file, directory or checkpoint",
        path=prefix,
        found=f"checkpoints {_listed(_prefixes(names))}" if _prefixes(names) else None,
        hint="check the spelling",
    )


def _nothing(folder: str, names: Collection[str]) -> InputError | UnsupportedError:
    """The error for a directory without an index."""
    meta = next((name for name in names if name.endswith(".meta")), None)
    data = next((name for name in names if _DATA.fullmatch(name)), None)
    if data is not None:
        return _index_missing(os.path.join(folder, data.partition(".data-")[0]), data)
    tables = (os.path.join(folder, name) for name in sorted(names)[:200])
    table = next((path for path in tables if _is_table(path)), None)
    if table is not None:
        return _version_1(table)
    if meta is not None:
        return _meta_alone(os.path.join(folder, meta))
    return InputError(
        "no TensorFlow checkpoint in this directory",
        path=folder,
        expected="an .index file",
        found=_listed(sorted(names)) or "an empty directory",
    )


def _index_missing(prefix: str, data: str) -> InputError:
    return InputError(
        "the index is missing; the data files cannot be read without it",
        path=prefix + ".index",
        found=data,
        hint="copy it next to the data files",
    )


def _refuse_saved_model(folder: str, names: Collection[str]) -> None:
    found = next((name for name in SAVED_MODELS if name in names), None)
    if found is not None:
        raise UnsupportedError(
            "this is a TensorFlow SavedModel (a program with weights), not a checkpoint of OpenAI's variables",
            path=os.path.join(folder, found),
            hint=_RESAVE,
        )


def _meta_alone(path: str) -> UnsupportedError:
    prefix = path.removesuffix(".meta")
    has_index = os.path.lexists(prefix + ".index")
    return UnsupportedError(
        "a .meta file holds TensorFlow's graph, not weights",
        path=path,
        hint=f"pass {prefix}" if has_index else "pass the prefix of the .index and .data files saved with it",
    )


def _version_1(path: str) -> UnsupportedError:
    return UnsupportedError(
        "this is a TensorFlow checkpoint of version 1 (a single table file, before TensorFlow 1.0)",
        path=path,
        expected="version 2: .index and .data files",
        hint=f"{_RESAVE}; if this is a renamed index, add .index to its name and put it next to its data files",
    )


def _latest(path: str) -> tuple[str | None, str]:
    """The prefix that a ``checkpoint`` text file names, relative to the file's directory; or None and the reason.

    Only checkpoints in the file's own directory or below it count: paths in the file are mostly from another machine.
    """
    content = read_small(path, MAX_STATE_BYTES, "a checkpoint state file")
    match = _LATEST.search(content)
    if match is None:
        explained = explain_bytes(content[:512], allow={"text"})
        return None, f"this file {explained}" if explained else "model_checkpoint_path is missing"
    named = _ESCAPE.sub(_unescaped, match[2]).decode("utf-8", "surrogateescape")
    folder, parts = os.path.dirname(path), re.split(r"[/\\]", named)
    relative = not os.path.isabs(named) and ".." not in parts and ":" not in parts[0] and "\0" not in named
    for candidate in ([named] if relative else []) + [parts[-1].replace("\0", "")]:
        if candidate and os.path.lexists(os.path.join(folder, candidate + ".index")):
            return candidate, ""
    return None, f"the latest checkpoint according to this file, {named[:200]}, is missing"


def _unescaped(match: re.Match[bytes]) -> bytes:
    """The bytes of one escape sequence of protobuf's text format."""
    hexadecimal, octal, other = match.groups()
    if hexadecimal is not None:
        return bytes([int(hexadecimal, 16)])
    if octal is not None:
        return bytes([int(octal, 8) & 0xFF])
    return {b"n": b"\n", b"r": b"\r", b"t": b"\t"}.get(other, other)


def _of_step(prefix: str, step: int | None) -> str:
    match = _STEP.fullmatch(os.path.basename(prefix))
    if step is not None and (match is None or int(match[2]) != step):
        raise UsageError(
            f"the path and --step {step} name different checkpoints",
            path=prefix,
            hint="pass the directory with --step, or the prefix without it",
        )
    return prefix


def _stem(name: str) -> str:
    match = _STEP.fullmatch(os.path.basename(name))
    return match[1] if match else name


def _prefixes(names: Collection[str]) -> list[str]:
    return [name.removesuffix(".index") for name in names if name.endswith(".index") and name != ".index"]


def _runs(folder: str, names: Collection[str]) -> list[str]:
    """Subdirectories that hold an index."""
    inside = {name: os.path.join(folder, name) for name in names if not name.startswith(".")}
    return [name for name, path in inside.items() if glob.glob(os.path.join(glob.escape(path), "*.index"))]


def _is_table(path: str) -> bool:
    """Whether a regular file ends with LevelDB's table magic number."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            file.seek(-min(len(MAGIC), os.fstat(file.fileno()).st_size), os.SEEK_END)
            return file.read() == MAGIC
    except (OSError, ValueError):
        return False


def _is_state(path: str) -> bool:
    """Whether the content looks like TensorFlow's ``checkpoint`` file; other programs use that name too."""
    try:
        file_size(path)
        with open(path, "rb") as file:
            return b"model_checkpoint_path" in file.read(4096)
    except (GptConvertError, OSError):
        return False


def _listed(names: Collection[str], most: int = 8) -> str:
    shown = ", ".join(list(names)[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown
