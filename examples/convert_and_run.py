"""Convert a checkpoint to ONNX with the Python API, then run the graph with onnxruntime.

    python examples/convert_and_run.py CHECKPOINT OUTPUT PROMPT

CHECKPOINT is a local path or a hub repository, in any format that ``gptconvert formats`` lists. The
tokenizer files must be beside the checkpoint. Prints the five most likely next tokens after PROMPT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it when it is imported

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

import gptconvert


def convert(source: str, output: Path) -> None:
    """Convert ``source`` to ONNX in ``output`` and verify it; raises ``GptConvertError`` on any failure."""
    options = gptconvert.Options(targets=("onnx",), force=True)
    checkpoint = gptconvert.open_checkpoint(source, options)  # reads headers only: fast at any model size
    print(f"{checkpoint.config.family}, {checkpoint.config.n_layer} layers, {checkpoint.nbytes:,} bytes")
    result = gptconvert.convert(checkpoint, output)  # with the options the checkpoint was opened with
    for note in result.notes:
        print(f"note: {note}")
    print(f"{len(result.files)} files, verified: {result.report is not None and result.report.passed}")


def next_tokens(directory: Path, prompt: str, count: int = 5) -> list[tuple[str, float]]:
    """The most likely tokens after ``prompt``, with their probabilities."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    session = onnxruntime.InferenceSession(directory / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([tokenizer.encode(prompt).ids])  # [1, S]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for item in session.get_inputs():
        if item.name.startswith("past_key_values."):  # [1, H, 0, D]: nothing cached yet
            feed[item.name] = np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
    logits = session.run(["logits"], feed)[0][0, -1].astype(np.float64)  # [V]
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [(tokenizer.decode([token]), float(probabilities[token])) for token in best]


def main(source: str, output: str, prompt: str) -> None:
    """Convert, run, print."""
    convert(source, Path(output))
    for token, probability in next_tokens(Path(output), prompt):
        print(f"{probability:6.1%}  {token!r}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
