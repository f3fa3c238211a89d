"""``gptconvert openai-tf``, ``hf`` … and ``convert``: one implementation, a name for each kind of source."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import click

from gptconvert.cli import options
from gptconvert.cli.output import Progress, human_bytes, note, print_json, table
from gptconvert.errors import printable
from gptconvert.model.options import OPSETS

if TYPE_CHECKING:
    from gptconvert.pipeline import Plan, Result

CONVERTING = options.stack(
    click.option(
        "--to",
        "targets",
        type=click.Choice(options.TARGETS),
        multiple=True,
        default=("onnx",),
        show_default=False,
        help="Format to write; repeat for several. [default: onnx]",
    ),
    click.option("-o", "--output", type=click.Path(), help="Directory to publish. [default: ./NAME-gptconvert]"),
    options.TASK,
    click.option(
        "--dtype",
        type=click.Choice(["fp32", "fp16", "bf16"]),
        help="Storage type of the weights. [default: as stored]",
    ),
    click.option(
        "--opset",
        type=click.IntRange(OPSETS[0], OPSETS[-1]),
        default=OPSETS[-1],
        show_default=True,
        help="ONNX operator set.",
    ),
    click.option(
        "--kv-cache/--no-kv-cache", default=True, help="ONNX graph with keys and values as inputs and outputs."
    ),
    click.option("--single-file", is_flag=True, help="Put ONNX weights inside the graph file (below 2 GiB)."),
    click.option(
        "--max-shard-size",
        default="5GB",
        show_default=True,
        callback=options.size_in_bytes,
        help="Largest safetensors file.",
    ),
    click.option("--xla", is_flag=True, help="SavedModel: add jit-compiled twins of fixed shape to the signatures."),
    options.VERIFY_LEVEL,
    click.option("--no-verify", is_flag=True, help="Publish without proof."),
    click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing."),
    click.option("--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or infinities."),
    click.option("--strict", is_flag=True, help="Fail where there would only be a note about the checkpoint."),
    click.option("--force", is_flag=True, help="Replace an existing output, once the new one is complete."),
    options.OUTPUT_FORMAT,
)

OPENAI_EPILOG = """\b
SOURCE is a prefix (model.ckpt), a directory, the `checkpoint` file or the
.index file. Directories of gpt-2-simple and nshepperd's fork work too, and so
does GPT-1's directory (params_0.npy …).

\b
Example:
  gptconvert openai-tf ./models/124M --to onnx --to safetensors -o gpt2
"""
HF_EPILOG = """\b
SOURCE is a directory, a weights file with config.json beside it, or a hub
repository. A token is taken from HF_TOKEN or the login of the hub's own
tools. No code from a repository is ever run, and no pickle executed.

\b
Example:
  gptconvert hf distilgpt2 --to onnx -o distilgpt2-onnx
"""


NANOGPT_EPILOG = """\b
SOURCE is a ckpt.pt or the directory it lies in. The file does not say which
GELU the model was trained with: erf since June 2023, tanh before. Its pickle
is read as data; nothing in it is executed, and meta.pkl is not opened.

\b
Example:
  gptconvert nanogpt ./out-shakespeare/ckpt.pt --to onnx --activation erf
"""
LLMC_EPILOG = """\b
SOURCE is a model file of version 1, 3 or 5 (gpt2_124M.bin, gpt2_124M_bf16.bin,
log124M/model_00018865.bin), or a directory with one; of several, name yours
with --weights-file. Rows that pad the vocabulary are left out.

\b
Example:
  gptconvert llmc gpt2_124M_bf16.bin --to safetensors
"""
MEGATRON_EPILOG = """\b
SOURCE is a model_optim_rng.pt, its mp_rank_00, or the directory of a run. Only
models that were not split over devices are read, of checkpoint version 0 to 3.

\b
Example:
  gptconvert megatron ./release/mp_rank_00/model_optim_rng.pt --to onnx
"""


MESH_TF_EPILOG = """\b
SOURCE is a prefix, a directory, the `checkpoint` file or the .index file, with
the model's config.json beside it (or --hparams FILE).

\b
Example:
  gptconvert mesh-tf ./GPT3_XL --to onnx
"""
MESH_JAX_EPILOG = """\b
SOURCE is the directory with shard_0 … inside, or the one with step_N inside.
Without the training run's JSON file beside it, or --hparams FILE, it is taken
for GPT-J 6B if it has its sizes.

\b
Example:
  gptconvert mesh-jax ./step_383500 --to safetensors --dtype fp16
"""
NEOX_EPILOG = """\b
SOURCE is the directory of a run (with `latest` and configs/) or of one step.
All ranks' files must be there. The configuration is configs/*.yml, or --hparams
FILE. The vocabulary stays padded unless --trim-vocab is given.

\b
Example:
  gptconvert neox ./20B_checkpoints --to safetensors
"""


def format_command(name: str, about: str, epilog: str, *extra: options.Decorator) -> click.Command:
    """The command that converts checkpoints of one format."""

    def run(source: str, **given: Any) -> None:
        _convert(source, name, given)

    run.__doc__ = about
    command = click.command(name, epilog=epilog)
    decorated: Any = options.stack(command, click.argument("source"), options.OPENING, *extra, CONVERTING)(run)
    return cast("click.Command", decorated)


openai_tf = format_command("openai-tf", "Convert OpenAI's own checkpoint SOURCE.", OPENAI_EPILOG)
hf = format_command(
    "hf", "Convert the Hugging Face checkpoint SOURCE: a directory or a hub repository.", HF_EPILOG, options.HUB
)
nanogpt = format_command("nanogpt", "Convert the nanoGPT checkpoint SOURCE.", NANOGPT_EPILOG, options.ACTIVATION)
mesh_tf = format_command("mesh-tf", "Convert GPT-Neo's original checkpoint SOURCE.", MESH_TF_EPILOG)
mesh_jax = format_command("mesh-jax", "Convert GPT-J's original checkpoint SOURCE.", MESH_JAX_EPILOG)
neox = format_command("neox", "Convert the GPT-NeoX checkpoint SOURCE.", NEOX_EPILOG)
llmc = format_command("llmc", "Convert the llm.c model SOURCE.", LLMC_EPILOG)
megatron = format_command(
    "megatron", "Convert the Megatron-LM GPT-2 checkpoint SOURCE.", MEGATRON_EPILOG, options.ACTIVATION
)


@click.command("convert")
@click.argument("source")
@options.OPENING
@options.HUB
@options.ACTIVATION
@CONVERTING
def convert(source: str, **given: Any) -> None:
    """Convert SOURCE, whatever it is: the format is detected."""
    _convert(source, None, given)


def _convert(source: str, format: str | None, given: dict[str, Any]) -> None:
    options.quieten()
    from gptconvert import pipeline
    from gptconvert.inspection import open_checkpoint

    quiet, as_json = given["quiet"], given["as_json"]
    chosen = options.chosen(given)
    output = given["output"] or default_output(source)
    checkpoint = open_checkpoint(source, chosen, format=format)
    if given["dry_run"]:
        planned = pipeline.plan(checkpoint)
        for text in planned.notes:
            note(text, quiet)
        if as_json:
            print_json({"ok": True, "dry_run": True, "output": output, **planned.as_dict()})
        else:
            click.echo(describe_plan(planned, output))
        return
    progress = Progress(quiet or as_json)
    try:
        result = pipeline.convert(checkpoint, output, progress=progress)
    finally:
        progress.close()
    for text in result.notes:
        note(text, quiet)
    if as_json:
        print_json({"ok": True, **result.as_dict()})
    else:
        click.echo(describe_result(result))


def default_output(source: str) -> str:
    """``./NAME-gptconvert``, NAME from the source; beside the source if we stand in it."""
    path = os.path.abspath(source)
    if not os.path.isdir(path):
        stem = os.path.basename(path).split(".")[0]
        told_by_folder = stem in ("model", "checkpoint", "pytorch_model")
        path = os.path.dirname(path) if told_by_folder else os.path.join(os.path.dirname(path), stem)
    name = f"{os.path.basename(path) or 'model'}-gptconvert"
    inside = os.path.isdir(source) and os.path.commonpath([os.getcwd(), path]) == path
    return os.path.join(os.path.dirname(path), name) if inside else name


def describe_plan(planned: Plan, output: str) -> str:
    """A dry run, for people."""
    rows = [("file", "size", "tensors", "copied as stored", "transformed")]
    for entry in planned.as_dict()["files"]:  # type: ignore[attr-defined]
        has = bool(entry["tensors"])
        rows.append(
            (
                entry["path"],
                human_bytes(entry["bytes"]),
                str(entry["tensors"]) if has else "",
                human_bytes(entry["copied_bytes"]) if has else "",
                str(len(entry["transformed"])) if has else "",
            )
        )
    head = f"Would write {human_bytes(planned.nbytes)} to {printable(output)}"
    return f"{head}\n{table(rows, right=(1, 2, 3, 4))}"


def describe_result(result: Result) -> str:
    """What was done, for people: the proof, then the files."""
    from gptconvert.families.registry import family_named

    config = result.checkpoint.config
    parameters = sum(weight.size for weight in result.checkpoint.weights.values())
    lines = [f"{family_named(config.family).title}: {parameters:,} parameters, {config.n_layer} layers"]
    lines.append(result.report.table() if result.report else "not verified (--no-verify)")
    lines.append(f"{printable(result.output)}/")
    lines.append(
        table([(f.path, human_bytes(f.nbytes)) for f in sorted(result.files, key=lambda f: f.path)], right=(1,))
    )
    return "\n".join(lines)
