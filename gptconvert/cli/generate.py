"""``gptconvert generate``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from gptconvert.cli.options import DEBUG, JSON, Command, Decorator, own, quieten
from gptconvert.cli.output import emit, emit_error, note, print_json, print_json_line
from gptconvert.errors import GptConvertError, InputError, UsageError
from gptconvert.targets.registry import RUNTIMES

if TYPE_CHECKING:
    from gptconvert.generation.model import Model
    from gptconvert.generation.results import Generated
    from gptconvert.generation.sampling import Sampling

PROMPTS, RUNTIME, CHOICE, LENGTH, SEVERAL = "Prompts", "Runtime", "Choice of tokens", "Length", "Several texts"
EPILOG = """\b
Greedy unless --temperature, --top-k, --top-p or --seed is given.
Options mean what they mean in transformers; the export's
generation_config.json sets other defaults.
Put -- before DIRECTORY if the prompt begins with a hyphen.
"""


def _option(group: str, flag: str, kind: Any, metavar: str, text: str, **settings: Any) -> Decorator:
    return own(flag, type=kind, metavar=metavar, help=text, group=group, show_default=True, **settings)


@click.command(cls=Command, epilog=EPILOG)
@click.argument("directory", type=click.Path())
@click.argument("prompt", required=False)
@own(
    "--interactive",
    is_flag=True,
    group=PROMPTS,
    help="Ask for one prompt after another, and keep the model loaded. Ctrl-C ends a text, Ctrl-D the program.",
)
@_option(
    PROMPTS,
    "--prompts",
    click.Path(),
    "FILE",
    'Continue each line of FILE, or each "prompt" of a .jsonl file; print a line of JSON for each.',
)
@own(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    default="onnx",
    show_default=True,
    group=RUNTIME,
    help="Run onnx/ with onnxruntime, saved_model/ with TensorFlow, model.safetensors with PyTorch, a GGUF file with "
    "llama.cpp, or model.tflite with LiteRT.",
)
@own(
    "--variant",
    type=click.Choice(["fp32", "q8", "q4", "fp16", "bf16"]),
    group=RUNTIME,
    default_text="the first of these",
    help="Run this ONNX graph; one that keeps its cache in place is preferred.",
)
@_option(
    CHOICE, "--temperature", click.FloatRange(min=0), "X", "Divide the logits by this; 0 is greedy.", default_text="1"
)
@_option(CHOICE, "--top-k", click.IntRange(min=1), "N", "Sample among the N most likely tokens.")
@_option(
    CHOICE,
    "--top-p",
    click.FloatRange(0, 1, min_open=True),
    "P",
    "Sample among the most likely tokens of total probability P.",
)
@_option(CHOICE, "--seed", click.IntRange(min=0), "N", "Seed the sampling; the same seed gives the same text.")
@_option(
    CHOICE,
    "--repetition-penalty",
    click.FloatRange(min=0, min_open=True),
    "X",
    "Make tokens of the text less likely: divide positive logits by this, and multiply negative ones.",
    default_text="1",
)
@_option(CHOICE, "--no-repeat-ngram-size", click.IntRange(min=0), "N", "Never write the same N tokens twice.")
@_option(LENGTH, "--max-new-tokens", click.IntRange(min=1), "N", "Stop after this many tokens.", default_text="50")
@_option(LENGTH, "--max-length", click.IntRange(min=1), "N", "Stop when prompt and text have this many tokens.")
@_option(LENGTH, "--min-new-tokens", click.IntRange(min=0), "N", "Do not end the text before this many tokens.")
@_option(LENGTH, "--stop", str, "TEXT", "End the text before TEXT. Repeatable.", multiple=True)
@_option(
    SEVERAL,
    "--num-return-sequences",
    click.IntRange(min=1),
    "N",
    "Write this many continuations: samples, or beams.",
    default_text="1",
)
@_option(SEVERAL, "--num-beams", click.IntRange(min=1), "N", "Search for the most likely text with N beams.")
@_option(
    SEVERAL,
    "--length-penalty",
    float,
    "X",
    "Divide scores of beams by the length to the power of this; above 0 prefers longer texts.",
    default_text="1",
)
@own(
    "--early-stopping",
    type=click.Choice(["false", "true", "never"]),
    group=SEVERAL,
    default_text="false",
    help="End the search with as many ended beams as --num-beams (true), when better ones are unlikely (false) or "
    "when they are impossible (never).",
)
@JSON
@DEBUG
def generate(
    directory: str,
    prompt: str | None,
    interactive: bool,
    prompts: str | None,
    runtime: str,
    variant: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Continue PROMPT with the model exported to DIRECTORY, using its KV cache.

    PROMPT is read from stdin if it is - or if stdin is a pipe.
    """
    quieten()
    from gptconvert.generation.model import load
    from gptconvert.generation.sampling import Sampling

    sampling = Sampling(**given)
    _check(prompt, prompts, as_json=as_json, interactive=interactive)
    text = _prompt(prompt) if prompts is None and not interactive else ""
    lines = [] if prompts is None else list(_lines(prompts))
    with load(directory, runtime, variant) as model:
        for each in model.notes:
            note(each)
        if prompts is not None:
            _print_lines(model, lines, sampling)
        elif interactive:
            _converse(model, sampling)
        elif as_json:
            generated = model.generate(text, sampling)
            print_json({"ok": True, **generated.as_dict()})
            _note_context(model, generated.continuations[0].stopped, len(generated.continuations[0].ids))
        else:
            _print(model, text, sampling)


def _check(prompt: str | None, prompts: str | None, *, as_json: bool, interactive: bool) -> None:
    """Raise UsageError unless there is one source of prompts."""
    given = [
        name
        for name, used in (
            ("PROMPT", prompt is not None),
            ("--prompts", prompts is not None),
            ("--interactive", interactive),
        )
        if used
    ]
    if len(given) > 1:
        raise UsageError(f"{given[0]} contradicts {given[1]}", hint="drop one of them")
    if interactive and as_json:
        raise UsageError("--json contradicts --interactive", hint="use --prompts, which prints JSON")


def _prompt(prompt: str | None) -> str:
    """The prompt, or what stdin holds, without the newline at its end."""
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("there is no PROMPT", hint="pass one, pipe one, or use --interactive")
    data = sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError:
        hint = "convert it first: iconv -f latin1 -t utf-8"
        raise UsageError("the prompt is not UTF-8 text", item="stdin", hint=hint) from None


def _print(model: Model, prompt: str, sampling: Sampling) -> None:
    """Print one continuation while it is generated, or several."""
    settings = model.settings(prompt, sampling)
    if settings.num_beams > 1 or settings.num_return_sequences > 1:
        generated = model.generate(prompt, sampling)
        _print_all(generated)
        stopped, speed, count = (
            generated.continuations[0].stopped,
            generated.speed,
            len(generated.continuations[0].ids),
        )
    else:
        running = model.stream(prompt, sampling)
        emit(prompt, nl=False)
        for piece in running.pieces:
            emit(piece, nl=False)
        emit()
        stopped, speed, count = running.stopped, running.speed, len(running.ids)
    if speed is not None:
        note(f"{speed:.1f} tokens per second")
    _note_context(model, stopped, count)


def _note_context(model: Model, stopped: str, count: int) -> None:
    if stopped == "context":
        note(f"stopped after {count} tokens: the context of {model.n_ctx} tokens is full")


def _print_all(generated: Generated) -> None:
    several = len(generated.continuations) > 1
    for number, each in enumerate(generated.continuations, 1):
        if several:
            score = "" if each.score is None else f", score {each.score:.3f}"
            emit(f"== {number} of {len(generated.continuations)}{score} ==")
        emit(f"{generated.prompt}{each.text}")


def _converse(model: Model, sampling: Sampling) -> None:
    """Continue one prompt after another; an error ends its text only."""
    with suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited, and earlier ones recalled
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            emit()
            return
        try:
            _print(model, prompt, sampling)
        except KeyboardInterrupt:
            emit()
        except (UsageError, InputError) as error:
            emit_error(f"error: {error}")


def _lines(path: str) -> Iterator[tuple[int, str | GptConvertError]]:
    """(line number, prompt or what is wrong with it) of a file; blank lines are skipped."""
    import json

    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = line.decode().rstrip("\r\n")
                    yield number, _field(json.loads(text)) if path.endswith(".jsonl") else text
                except (ValueError, RecursionError) as error:  # of UTF-8 and JSON
                    yield number, InputError("not a prompt", path=path, item=f"line {number}", found=str(error)[:100])
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error


def _field(entry: object) -> str:
    if isinstance(entry, Mapping) and isinstance(entry.get("prompt"), str):
        return str(entry["prompt"])
    raise ValueError('expected an object with the text "prompt"')


def _print_lines(model: Model, lines: list[tuple[int, str | GptConvertError]], sampling: Sampling) -> None:
    """A line of JSON for each prompt.

    Raises:
        SystemExit: some failed; with the largest of their exit codes.
    """
    worst = 0
    for number, prompt in lines:
        try:
            if isinstance(prompt, GptConvertError):
                raise prompt
            fields = {"ok": True, **model.generate(prompt, sampling).as_dict()}
        except GptConvertError as error:
            worst = max(worst, error.exit_code)
            text = {} if isinstance(prompt, GptConvertError) else {"prompt": prompt}
            fields = {"ok": False, **text, "error": error.as_dict()}
        print_json_line({"line": number, **fields})
    if worst:
        raise SystemExit(worst)
