"""``gptconvert generate``."""

from __future__ import annotations

import json

import click

from gptconvert.cli.options import quieten


@click.command(epilog="Greedy unless --temperature, --top-k, --top-p or --seed is given.")
@click.argument("directory", type=click.Path())
@click.argument("prompt")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=50, show_default=True, help="Stop after this many."
)
@click.option("--temperature", type=click.FloatRange(min=0), help="Divides the logits; 0 is greedy. [default: 1]")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among this many best tokens.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample among the best with this probability."
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the sampling; the same seed gives the same text.")
@click.option(
    "--runtime",
    type=click.Choice(["onnx", "tf", "torch"]),
    default="onnx",
    show_default=True,
    help="What runs which artifact: onnxruntime onnx/, TensorFlow saved_model/, PyTorch model.safetensors.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def generate(
    directory: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    runtime: str,
    as_json: bool,
) -> None:
    """Continue PROMPT with the model exported to DIRECTORY, with its KV cache."""
    quieten()
    from gptconvert.generate.sampling import Sampling
    from gptconvert.generate.text import generate as run

    sampled = (temperature, top_k, top_p, seed) != (None, None, None, None)
    heat = temperature if temperature is not None else float(sampled)
    sampling = Sampling(max_new_tokens, heat, top_k, top_p, seed or 0)
    running = run(directory, prompt, sampling, runtime)
    if as_json:
        text = "".join(running.pieces)
        fields = {"prompt": prompt, "text": text, "prompt_ids": running.prompt, "ids": running.ids}
        click.echo(json.dumps({"schema_version": 1, "ok": True, **fields}, indent=2))
        return
    click.echo(prompt, nl=False)
    for piece in running.pieces:
        click.echo(piece, nl=False)
    click.echo()
