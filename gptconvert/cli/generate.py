"""``gptconvert generate``."""

from __future__ import annotations

from typing import Any

import click

from gptconvert.cli.options import DEBUG, JSON, Command, Decorator, own, quieten
from gptconvert.cli.output import emit, note, print_json
from gptconvert.targets.registry import RUNTIMES

RUNTIME, SAMPLING = "Runtime", "Sampling"
EPILOG = """\b
Greedy unless --temperature, --top-k, --top-p or --seed is given.
Put -- before DIRECTORY if the prompt begins with a hyphen.
"""


def _sampling(flag: str, kind: Any, metavar: str, text: str, **settings: Any) -> Decorator:
    return own(flag, type=kind, metavar=metavar, help=text, group=SAMPLING, show_default=True, **settings)


@click.command(cls=Command, epilog=EPILOG)
@click.argument("directory", type=click.Path())
@click.argument("prompt")
@own(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    default="onnx",
    show_default=True,
    group=RUNTIME,
    help="Run onnx/ with onnxruntime, saved_model/ with TensorFlow, or model.safetensors with PyTorch.",
)
@own(
    "--variant",
    type=click.Choice(["fp32", "q8", "q4", "fp16", "bf16"]),
    group=RUNTIME,
    default_text="the first of these",
    help="Run this ONNX graph; one that keeps its cache in place is preferred.",
)
@_sampling("--max-new-tokens", click.IntRange(min=1), "N", "Stop after this many tokens.", default=50)
@_sampling("--temperature", click.FloatRange(min=0), "X", "Divide the logits by this; 0 is greedy.", default_text="1")
@_sampling("--top-k", click.IntRange(min=1), "N", "Sample among the N most likely tokens.")
@_sampling(
    "--top-p",
    click.FloatRange(0, 1, min_open=True),
    "P",
    "Sample among the most likely tokens of total probability P.",
)
@_sampling("--seed", click.IntRange(min=0), "N", "Seed the sampling; the same seed gives the same text.")
@JSON
@DEBUG
def generate(
    directory: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    runtime: str,
    variant: str | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with the model exported to DIRECTORY, using its KV cache."""
    quieten()
    from gptconvert.generate.sampling import Sampling
    from gptconvert.generate.text import generate as run

    sampled = (temperature, top_k, top_p, seed) != (None, None, None, None)
    heat = temperature if temperature is not None else float(sampled)
    sampling = Sampling(max_new_tokens, heat, top_k, top_p, seed or 0)
    running = run(directory, prompt, sampling, runtime, variant)
    for text in running.notes:
        note(text)
    if as_json:
        continued = "".join(running.pieces)
        fields = {"prompt": prompt, "text": continued, "prompt_ids": running.prompt, "ids": running.ids}
        speed = running.speed
        rate = None if speed is None else round(speed, 1)
        print_json({"ok": True, **fields, "stopped": running.stopped, "tokens_per_second": rate})
    else:
        emit(prompt, nl=False)
        for piece in running.pieces:
            emit(piece, nl=False)
        emit()
        if running.speed is not None:
            note(f"{running.speed:.1f} tokens per second")
    if running.stopped == "context":
        note(f"stopped after {len(running.ids)} tokens: the context of {running.n_ctx} tokens is full")
