"""Tokens per second of an exported graph in onnxruntime compared with PyTorch; batch 1, plain ``session.run``.

The engines take turns on each case. The graph under test runs twice under two names: their ratio is this machine's
measurement noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

#: Case → (past tokens, new tokens, repetitions)
CASES = {"decode at 128": (128, 1, 25), "decode at 900": (900, 1, 15), "prefill of 128": (0, 128, 7)}
STEPS = 4
PAUSE_SECONDS = 0.3


def onnx_session(path: Path, threads: int = 0) -> Any:
    """A session on the CPU, with onnxruntime's default options; ``threads`` 0 is one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_step(
    path: Path, past: int, new: int, layers: int, heads: int, head_dim: int, *, vocab: int = 50257, threads: int = 0
) -> Callable[[], object]:
    """One run of the graph with a random past."""
    session = onnx_session(path, threads)
    random = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {
        "input_ids": random.integers(0, vocab, (1, new)),
        "attention_mask": np.ones((1, past + new), np.int64),
        "position_ids": np.arange(past, past + new)[None],
    }
    for i in range(layers):
        for part in ("key", "value"):
            feed[f"past_key_values.{i}.{part}"] = random.standard_normal((1, heads, past, head_dim), dtype=np.float32)
    feed = {item.name: feed[item.name] for item in session.get_inputs()}
    return lambda: session.run(None, feed)


def torch_step(directory: Path, past: int, new: int) -> Callable[[], object]:
    """The same step in transformers with PyTorch, eager."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.randint(0, 50257, (1, new))
    with torch.no_grad():
        cache = model(torch.randint(0, 50257, (1, past)), use_cache=True).past_key_values if past else None

    def step() -> object:
        with torch.no_grad():
            own = None
            if cache is not None:  # the cache grows in place, so every step starts from a shallow copy
                own = DynamicCache()
                for i, layer in enumerate(cache.layers):
                    own.update(layer.keys, layer.values, i)
            return model(ids, past_key_values=own, use_cache=True).logits

    return step


def tokens_per_second(engines: dict[str, Callable[[], object]], new: int, repetitions: int) -> dict[str, list[float]]:
    """Rates per engine, measured in turn."""
    steps = STEPS if new == 1 else 1
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for step in engines.values():
        step()
    for _ in range(repetitions):
        for name, step in engines.items():
            # The previous engine's threads spin for a while after its last run and would occupy a core.
            time.sleep(PAUSE_SECONDS)
            step()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            rates[name].append(new * steps / (time.perf_counter() - start))
    return rates


def report(export: Path, config: dict[str, int], peers: dict[str, Path] | None = None) -> str:
    """Measure all cases and return a Markdown table.

    Args:
        export: directory with onnx/model.onnx and model.safetensors.
        config: the model's hparams.
        peers: name → another graph to time.
    """
    sizes = (config["n_layer"], config["n_head"], config["n_embd"] // config["n_head"])
    lines = ["| case | " + " | ".join(["gptconvert", "again (A/A)", *(peers or {}), "PyTorch eager"]) + " |"]
    lines.append("|" + " --- |" * (lines[0].count("|") - 1))
    for case, (past, new, repetitions) in CASES.items():
        graph = export / "onnx" / "model.onnx"
        engines: dict[str, Callable[[], object]] = {"gptconvert": onnx_step(graph, past, new, *sizes)}
        engines["again"] = onnx_step(graph, past, new, *sizes)
        for name, path in (peers or {}).items():
            engines[name] = onnx_step(path, past, new, *sizes)
        engines["torch"] = torch_step(export, past, new)
        rates = tokens_per_second(engines, new, repetitions)
        cells = []
        for name in engines:
            ratio = median(a / b for a, b in zip(rates["gptconvert"], rates[name], strict=True))
            cells.append(f"{median(rates[name]):.1f}" + ("" if name == "gptconvert" else f" (×{ratio:.2f})"))
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
