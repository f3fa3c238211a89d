"""The list of jobs: JSON Lines with one job per line, or YAML with a list of jobs.

A bad job becomes an :class:`Entry` with an error, so that the others still run.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from gptconvert.containers.json import kind, parse_json
from gptconvert.containers.yaml import line_numbers, parse_yaml
from gptconvert.errors import GptConvertError, UsageError, os_errors_as
from gptconvert.model.option_info import parse_size
from gptconvert.model.options import DEFAULTS, FIELDS, INFO, Options
from gptconvert.sources.detect import FORMATS
from gptconvert.sources.hub import is_repo_id
from gptconvert.targets.registry import TARGETS

#: Keys of a job. ``command`` is another name of ``format``.
KEYS = ("source", "output", "format", "command", "targets", "options", "memory")
#: The value of ``format`` that detects the format, as the command of that name does.
DETECT = "convert"
#: A whole model repository: ``hf://org/name`` or ``hf://org/name@revision``.
_HUB_URL = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/?")
#: Largest list, and largest YAML document, in bytes.
MAX_BYTES, MAX_YAML_BYTES = 64 << 20, 4 << 20


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        source: an absolute path, a hub repository, or a URL.
        output: an absolute path, or a URL.
        format: name of the source format; None to detect it.
        options: including the targets; local paths are absolute.
        memory: bytes that the job needs; None to estimate it.
    """

    source: str
    output: str
    format: str | None
    options: Options
    memory: int | None = None

    def as_dict(self) -> dict[str, object]:
        """The job as plain values, from which :func:`parse_job` makes it again."""
        options = {name: getattr(self.options, name) for name in self.options.given() if name != "targets"}
        return {
            "source": self.source,
            "output": self.output,
            "format": self.format,
            "targets": list(self.options.targets),
            "options": options,
            "memory": self.memory,
        }


@dataclass(frozen=True)
class Entry:
    """One line of the list.

    Attributes:
        line: its number, from 1; in YAML, the line where the job begins.
        source: as written; None if missing.
        output: as written; None if missing.
        job: the job; None if the line is bad.
        error: what is wrong with the line; None if it is good.
    """

    line: int
    source: str | None
    output: str | None
    job: Job | None = None
    error: GptConvertError | None = None


def read_jobs(path: str) -> list[Entry]:
    """The jobs of a file, in order; ``-`` reads standard input.

    Raises:
        UsageError: it cannot be read, is not a list of jobs, or is empty.
    """
    text = _text(path)
    if path.endswith((".yaml", ".yml")):
        entries = list(_yaml_entries(text, path))
    else:
        entries = [_json_entry(number, line, path) for number, line in _json_lines(text, path)]
    if not entries:
        raise UsageError("no jobs in the list", path=path, hint='one per line: {"source": …, "output": …}')
    return refuse_conflicts(entries)


def _text(path: str) -> str:
    with os_errors_as(UsageError, "cannot be read", path):
        if path == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UsageError("the list of jobs is too large", path=path, expected=f"at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"the list of jobs is not UTF-8 (byte {error.start})", path=path) from error


def _json_lines(text: str, path: str) -> Iterator[tuple[int, str]]:
    if text.lstrip()[:1] == "[":
        hint = "write one object per line, or name the file .yaml: YAML includes JSON"
        raise UsageError("a JSON array, not JSON Lines", path=path, expected="one job per line", hint=hint)
    # Not splitlines(), which also splits at characters that JSON allows in strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _json_entry(number: int, line: str, path: str) -> Entry:
    try:
        value = parse_json(line.strip().encode("utf-8", "surrogatepass"), path, "the job")
    except GptConvertError as error:
        message = error.message.replace("(line 1, column", "(column")
        return Entry(number, None, None, error=_at(number, UsageError(message, path=path)))
    return _entry(number, value, path)


def _yaml_entries(text: str, path: str) -> Iterator[Entry]:
    if len(text) > MAX_YAML_BYTES:
        hint = "use JSON Lines for long lists"
        raise UsageError("the list of jobs is too large for YAML", path=path, hint=hint)
    try:
        value = parse_yaml(text, path)
    except GptConvertError as error:
        raise UsageError(error.message, path=path, hint=error.hint) from error
    if value is None:
        return
    if not isinstance(value, list):
        expected = "a list, each item beginning with `- source:`"
        raise UsageError("not a list of jobs", path=path, expected=expected, found=kind(value))
    for number, item in zip(line_numbers(text), value, strict=True):
        yield _entry(number, item, path)


def _entry(number: int, value: object, path: str) -> Entry:
    shown = value if isinstance(value, dict) else {}
    source, output = (each if isinstance(each, str) else None for each in (shown.get("source"), shown.get("output")))
    try:
        return Entry(number, source, output, job=parse_job(value))
    except GptConvertError as error:
        error.path = error.path or path
        return Entry(number, source, output, error=_at(number, error))


def _at(number: int, error: GptConvertError) -> GptConvertError:
    error.message = f"line {number}: {error.message}"
    return error


def parse_job(value: object) -> Job:
    """The job that a line describes.

    Raises:
        UsageError: a key is missing, unknown or has a bad value, or options contradict each other.
    """
    if not isinstance(value, dict):
        raise UsageError("a job is an object", expected='{"source": …, "output": …}', found=kind(value))
    given = {key: each for key, each in value.items() if each is not None}
    _refuse_unknown(value, KEYS, "key")
    texts = {key: _text_of(given, key) for key in ("source", "output", "format", "command")}
    source, output = texts["source"], texts["output"]
    if source is None or output is None:
        missing = "source" if source is None else "output"
        raise UsageError(f"`{missing}` is missing", expected='{"source": …, "output": …}')
    form = _format_of(texts["format"], texts["command"])
    options = _options_of(given.get("options", {}), given.get("targets"))
    if (repo := _HUB_URL.fullmatch(source)) is not None:  # the hub's own reader knows which files are needed
        source, options = repo[1], dataclasses.replace(options, revision=unquote(repo[2] or "") or options.revision)
    return Job(
        source=_located(source, form),
        output=output if is_url(output) else os.path.abspath(output),
        format=form,
        options=options,
        memory=_memory_of(given.get("memory")),
    )


def is_url(text: str) -> bool:
    """Whether a source or an output is a URL, not a path."""
    return "://" in text


def _text_of(given: Mapping[str, object], key: str) -> str | None:
    value = given.get(key)
    if value is not None and (not isinstance(value, str) or not value or "\0" in value):
        raise UsageError(f"invalid value of `{key}`", expected="text that is not empty", found=repr(value)[:80])
    return value


def _refuse_unknown(given: Mapping[Any, object], known: Sequence[str], what: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        named = ", ".join(f"`{name}`{_suggestion(str(name), known)}" for name in unknown[:8])
        keys = f"keys: {', '.join(known)}" if what == "key" else "docs/api.md lists the fields of Options"
        raise UsageError(f"unknown {what}{'s' * (len(unknown) > 1)} {named}", hint=keys)


def _suggestion(name: str, known: Sequence[str]) -> str:
    """The known name that is meant, perhaps by its flag: ``max-shard-size``, ``--set``, ``no-verify``."""
    flag, positive = f"--{name.lstrip('-').replace('_', '-')}", f"--{name.lstrip('-').replace('_', '-')}"
    positive = positive.replace("--no-", "--", 1)
    fields = {info.flag: "targets" if field == "targets" else field for field, info in INFO.items()}
    field = fields.get(flag) or fields.get(positive)
    if field is not None and (field in known or known is KEYS):
        value = {"verify": ": null", "kv_cache": ": false"}.get(field, "") if flag != positive else ""
        where = "" if field in known else " in `options`"
        return f" (did you mean `{field}{value}`{where}?)"
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def _format_of(form: str | None, command: str | None) -> str | None:
    if form is not None and command is not None:
        raise UsageError("`format` and `command` mean the same", hint="drop one of them")
    name = form or command
    names = [DETECT, *(each.name for each in FORMATS)]
    if name is not None and name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else None
        raise UsageError("unknown source format", expected=f"one of {', '.join(names)}", found=name, hint=hint)
    return None if name == DETECT else name


def _options_of(given: object, targets: object) -> Options:
    if not isinstance(given, dict):
        raise UsageError("`options` is an object", expected='{"dtype": "fp16"}', found=kind(given))
    if "targets" in given or "to" in given:
        raise UsageError("targets are not an option", hint='write "targets": [...] beside "options"')
    _refuse_unknown(given, [name for name in FIELDS if name != "targets"], "option")
    values = {name: value for name, value in given.items() if value is not None or name == "verify"}
    if isinstance(values.get("verify"), bool):
        values["verify"] = DEFAULTS["verify"] if values["verify"] else None
    options = Options(**values, targets=_targets_of(targets))
    options.check_targets(values)
    absolute: dict[str, Any] = dict(_absolute(options))
    return dataclasses.replace(options, **absolute)


def _targets_of(value: object) -> tuple[str, ...]:
    if value is None:
        return tuple(DEFAULTS["targets"])
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError("invalid `targets`", expected='a list, such as ["onnx"]', found=repr(value)[:80])
    wrong = [name for name in names if name not in TARGETS]
    if wrong:
        raise UsageError("unknown target", expected=f"one of {', '.join(TARGETS)}", found=", ".join(wrong))
    return tuple(dict.fromkeys(names))


def _memory_of(value: object) -> int | None:
    try:
        return None if value is None else parse_size(str(value))
    except ValueError as error:
        raise UsageError("invalid value of `memory`", expected=str(error), found=repr(value)[:80]) from None


def _located(source: str, form: str | None) -> str:
    """The source, with a local path made absolute: jobs run in processes with other current directories."""
    if is_url(source):
        return source
    could_be_hub = form in (None, "hf") and is_repo_id(source)
    local = os.path.lexists(source) or (os.path.dirname(source) and os.path.isdir(os.path.dirname(source)))
    return source if could_be_hub and not local else os.path.abspath(source)


def _absolute(options: Options) -> Iterator[tuple[str, str]]:
    """Options that are local paths, made absolute."""
    for name, info in options.given().items():
        value = getattr(options, name)
        if info.metavar in ("FILE", "DIR") and (not info.repo or os.path.exists(value)):
            yield name, os.path.abspath(value)


def refuse_conflicts(entries: Iterable[Entry]) -> list[Entry]:
    """Replace jobs that write where an earlier one does, or read what another writes, by errors."""
    checked, outputs, above = [], dict[str, int](), dict[str, int]()
    for entry in entries:
        output = place(entry.job.output) if entry.job is not None else ""
        clash = _clash(output, outputs, above)
        if clash is not None:
            checked.append(_refused(entry, f"{clash}, and two jobs must not write to one output"))
            continue
        if output:
            outputs[output] = entry.line
            above |= dict.fromkeys(_ancestry(output), entry.line)
        checked.append(entry)
    return [_refuse_dependent(entry, outputs) for entry in checked]


def _clash(output: str, outputs: Mapping[str, int], above: Mapping[str, int]) -> str | None:
    """The other job's output that is ``output``, contains it, or is inside it."""
    for parent in _ancestry(output):
        if parent in outputs:
            return f"the output {'is' if parent == output else 'is inside'} that of line {outputs[parent]}"
    return f"the output contains that of line {above[output]}" if output in above else None


def _refuse_dependent(entry: Entry, outputs: Mapping[str, int]) -> Entry:
    if entry.job is None or not (is_url(entry.job.source) or os.path.isabs(entry.job.source)):
        return entry
    line = next((outputs[above] for above in _ancestry(place(entry.job.source)) if above in outputs), None)
    if line is None or line == entry.line:  # a job that reads its own output has a better message
        return entry
    return _refused(entry, f"the source is the output of line {line}", "run it in a list of its own, afterwards")


def _refused(entry: Entry, message: str, hint: str | None = None) -> Entry:
    error = _at(entry.line, UsageError(message, path=entry.output, hint=hint))
    return dataclasses.replace(entry, job=None, error=error)


def _ancestry(location: str) -> Iterator[str]:
    while location:
        yield location
        location = location.rpartition("/")[0]


def place(location: str) -> str:
    """One spelling for each source or output: links resolved, and ``file://`` removed."""
    if location.startswith("file://"):
        location = location.removeprefix("file://")
    return location.rstrip("/") if is_url(location) else os.path.realpath(location)


def shard(entries: Sequence[Entry], index: int, count: int) -> list[Entry]:
    """Every ``count``-th entry from ``index``: the shards of a list are disjoint, and together the whole list."""
    return list(entries[index::count])
