"""Options that several commands share, each written once."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gptconvert.model.options import Options

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def stack(*decorators: Decorator) -> Decorator:
    """Several decorators as one, applied so that help lists them in the order given."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda f, d: d(f), reversed(decorators), function)

    return apply


OUTPUT_FORMAT = stack(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on stderr."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)

OPENING = stack(
    click.option("--step", type=click.IntRange(min=0), help="Which training step, if the directory holds several."),
    click.option(
        "--hparams", type=click.Path(), help="Configuration file to use instead of the one beside the weights."
    ),
    click.option("--n-head", type=click.IntRange(min=1), help="Number of heads, if the format does not record it."),
    click.option(
        "--trim-vocab", type=click.IntRange(min=1), metavar="N", help="Keep N ids; the rest pad the vocabulary."
    ),
    click.option("--weights-file", metavar="NAME", help="Which weights file to read, if there are several."),
)

HUB = stack(
    click.option("--revision", help="Hub branch, tag or commit. The resolved commit is recorded."),
    click.option("--cache-dir", type=click.Path(file_okay=False), help="Hub cache directory."),
    click.option("--offline", is_flag=True, help="Use the hub cache only; never the network."),
)

#: Equal to the names in ``gptconvert.targets.registry``, which a test checks; importing it would slow ``--help``.
TARGETS = ("onnx", "safetensors", "tf", "openai-tf")
RUNTIMES = ("onnx", "tf", "torch")
#: Parameters that say what the command line prints, or where to.
COMMAND_LINE_ONLY = frozenset({"output", "no_verify", "dry_run", "as_json", "quiet", "tensors", "full"})

#: Equal to ``reference_model.config.TASKS``, which a test checks; importing it would cost every ``--help``.
TASKS = (
    "text-generation",
    "feature-extraction",
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
)
TASK = stack(
    click.option(
        "--task", type=click.Choice(TASKS), help="What the model is for; default: what the checkpoint's heads say."
    ),
    click.option(
        "--pad-token-id", type=click.IntRange(min=0), help="Token that text classification takes for padding."
    ),
)

ACTIVATION = click.option(
    "--activation",
    type=click.Choice(["tanh", "erf"]),
    help="Formula of GELU, for nanoGPT and Megatron-LM files, which may not record it.",
)

VERIFY_LEVEL = click.option(
    "--verify",
    "verify",
    is_flag=False,
    flag_value="default",
    default="default",
    type=click.Choice(["default", "full"]),
    help="How thoroughly to verify: default, or full (all lengths up to the context).",
)


def chosen(given: dict[str, Any], **more: object) -> Options:
    """What a command was given, as one value. Parameters of the command line alone are left out."""
    from gptconvert.model.options import FIELDS, Options

    unknown = {*given} - {*FIELDS} - COMMAND_LINE_ONLY
    if unknown:
        raise TypeError(f"command-line parameters without an option: {', '.join(sorted(unknown))}")
    values = {name: given[name] for name in FIELDS if name in given} | more
    values["targets"] = tuple(dict.fromkeys(values.get("targets", ("onnx",))))
    if given.get("no_verify"):
        values["verify"] = None
    return Options(**values)


def size_in_bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """``5GB``, ``500MB``, ``1GiB`` or a number of bytes."""
    if value is None:
        return None
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    number = value.strip().rstrip("KMGIBkmgib")
    unit = value.strip()[len(number) :].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise click.BadParameter("a size is a number and KB, MB, GB, KiB, MiB or GiB, such as 5GB") from None
    if size < 1:
        raise click.BadParameter("must be positive")
    return size


def quieten() -> None:
    """Keep libraries from writing on stderr: what the user should know is said by us."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "GRPC_VERBOSITY"):
        os.environ.setdefault(name, "3" if name.startswith("TF") else "ERROR")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
