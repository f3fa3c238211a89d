"""Write docs/api.md from the docstrings of the public names: ``python docs/make_api.py``, or ``make docs``.

Supports Google-style sections and the few roles that these docstrings use; it is not a general documentation tool.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gptconvert
from gptconvert.generation.model import Model
from gptconvert.generation.results import Continuation, Continued, Generated
from gptconvert.generation.sampling import Sampling
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import INFO
from gptconvert.model.progress import Progress
from gptconvert.pipeline import Plan, Result
from gptconvert.quality import Measured
from gptconvert.verify.quality import Quality
from gptconvert.verify.report import ArtifactReport, Report

PAGE = Path(__file__).with_name("api.md")
FUNCTIONS = ("open_checkpoint", "inspect", "plan", "convert", "verify_export", "measure_quality", "generate", "load")
#: Classes that the functions take and return.
VALUES: tuple[type, ...] = (
    *(Checkpoint, Plan, Result, Report, ArtifactReport, Measured, Quality),
    *(Sampling, Model, Generated, Continuation, Continued, Progress),
)
SECTIONS = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Errors", "Returns": "Returns"}
LINE = 100

HEAD = """# Python API

Generated from the docstrings by `make docs`; a test checks that it is current. Anything not on this
page is internal and may change.

```python
from gptconvert import Options, Sampling, convert, load, open_checkpoint, plan, verify_export

checkpoint = open_checkpoint("./models/124M", Options(targets=("onnx", "safetensors")))  # headers only
print(plan(checkpoint).nbytes)  # what would be written
result = convert(checkpoint, "gpt2")  # verified and published, or raises and writes nothing
report = verify_export("./models/124M", "./an-export-of-another-tool")

with load("gpt2") as model:  # runs the export, one prompt after another
    print(model.generate("Hello", Sampling(num_beams=5, num_return_sequences=3)))
```

One `Options` value holds every choice: how to open a checkpoint, what to write, how to verify. It travels with the
checkpoint it opened, so pass it to `plan` and `convert` only to override output options. `import gptconvert` is
cheap; the names below are imported on first use.
"""


def render() -> str:
    """Return the page."""
    assert {*FUNCTIONS, "Options", "Progress", "Sampling", "errors"} == {*gptconvert.__all__}, (
        "a public name is missing from this page"
    )
    blocks = [HEAD, "## Functions\n", *(_function(getattr(gptconvert, name)) for name in FUNCTIONS)]
    blocks += ["## Options\n", _options(), "## Errors\n", _errors()]
    blocks += ["## Values\n", *(_value(kind) for kind in VALUES)]
    return "\n".join(blocks)


def _function(function: Callable[..., Any]) -> str:
    code = _signature(function.__name__, inspect.signature(function))
    return f"### {function.__name__}\n\n```python\n{code}\n```\n\n{_docstring(function)}"


def _signature(name: str, signature: inspect.Signature) -> str:
    """On one line, or with one parameter per line if that is too long."""
    returns = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        kind = f": {parameter.annotation}" if parameter.annotation is not parameter.empty else ""
        default = f" = {parameter.default!r}" if parameter.default is not parameter.empty else ""
        parts.append(f"{parameter.name}{kind}{default}")
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= LINE else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def _options() -> str:
    """The fields as a table, with their command-line flags."""
    summary, sections = _parsed(gptconvert.Options)
    described = dict(sections["Attributes"])
    rows = [
        f"| `{field.name}` | `{field.type}` | `{field.default!r}` | `{INFO[field.name].flag}` |"
        f" {described[field.name]} |"
        for field in dataclasses.fields(gptconvert.Options)
    ]
    head = "| field | type | default | command line | |\n| --- | --- | --- | --- | --- |"
    return "\n".join([summary, "", head, *(row.replace(" | None`", r" \| None`") for row in rows), ""])


def _errors() -> str:
    base = gptconvert.errors.GptConvertError
    rows = [f"| `{e.__name__}` | {e.exit_code} | {_parsed(e)[0]} |" for e in base.__subclasses__()]
    head = "All are in `gptconvert.errors`; the exit code is the command line's.\n"
    table = ["| error | exit code | |", "| --- | --- | --- |", *rows]
    return "\n".join([head, *table, "", f"### {base.__name__}\n\n{_docstring(base)}"])


def _value(kind: type) -> str:
    """A class: its fields, then its properties and methods."""
    summary, sections = _parsed(kind)
    described = sections.get("Attributes", [])
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    missing = {field.name for field in fields} - {*dict(described)}
    assert not missing, f"{kind.__name__}: no description of {missing}"
    members = [
        (f"{name}()" if inspect.isfunction(member) else name, _parsed(member)[0])
        for name, member in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    ]
    return "\n".join([f"### {kind.__name__}", "", summary, "", *_list([*described, *members]), ""])


def _docstring(item: Any) -> str:
    """Summary, then the sections as lists."""
    summary, sections = _parsed(item)
    lines = [summary, ""]
    for name, entries in sections.items():
        lines += [f"{SECTIONS[name]}:", "", *_list(entries), ""]
    return "\n".join(lines)


def _list(entries: Iterable[tuple[str, str]]) -> list[str]:
    return ["* " + ": ".join(filter(None, (f"`{name}`" if name else "", text))) for name, text in entries]


def _parsed(item: Any) -> tuple[str, dict[str, list[tuple[str, str]]]]:
    """Summary, and section → entries (name, text)."""
    doc = inspect.getdoc(item) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.MULTILINE)
    sections = {parts[i]: list(_entries(parts[i + 1], named=parts[i] != "Returns")) for i in range(1, len(parts), 2)}
    return _markdown(parts[0]), sections


def _entries(body: str, *, named: bool) -> Iterator[tuple[str, str]]:
    """Indented ``name: text`` entries; deeper lines continue the entry."""
    for entry in re.split(r"\n(?=    \S)", body.rstrip()):
        text = " ".join(entry.split())
        name, colon, rest = text.partition(": ")
        yield (name, _markdown(rest)) if named and colon else ("", _markdown(text))


def _markdown(text: str) -> str:
    """reStructuredText's roles and literals → code spans; paragraphs on one line each."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda m: f"`{m.group(1).removeprefix('gptconvert.')}`", text)
    text = text.replace("``", "`").strip()
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
