"""``python -m benchmarks [124M 1558M]``: conversion against ``cp``, latencies, decode and prefill against PyTorch.

Prints Markdown tables (docs/performance.md shows one run). Needs free disk space of three times the largest
checkpoint: for the checkpoint, the copy and the export.

``python -m benchmarks scale`` measures how memory grows with the number of layers: see ``benchmarks/scale.py``.
``python -m benchmarks variants`` measures quantised, last-token and in-place graphs: see ``benchmarks/variants.py``.
``python -m benchmarks batch`` measures many conversions at a time: see ``benchmarks/batch.py``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median

from benchmarks import batch, scale, variants
from benchmarks.checkpoints import SIZES, openai_checkpoint
from benchmarks.measure import Run, interleaved, median_ratio
from benchmarks.speed import report

GPTCONVERT = [sys.executable, "-m", "gptconvert"]


def conversions(size: str, data: Path, rounds: int, *, memory_at_hand: bool = False) -> str:
    """Wall time and memory of conversions of one checkpoint, interleaved with ``cp`` of its bytes."""
    source, output, hf = openai_checkpoint(size, data), data / "out", data / f"{size}-hf"
    weights = source / "model.ckpt.data-00000-of-00001"
    if not hf.exists():
        interleaved(
            {"": [*GPTCONVERT, "openai-tf", str(source), "--to", "safetensors", "--no-verify", "-o", str(hf)]}, 1
        )
    to = ["-q", "-o", str(output / "export")]
    commands = {
        "cp": ["cp", str(weights), str(output)],
        "openai-tf → onnx, --no-verify": [*GPTCONVERT, "openai-tf", str(source), "--no-verify", *to],
        "hf → onnx, --no-verify": [*GPTCONVERT, "hf", str(hf), "--no-verify", *to],
        "openai-tf → safetensors, --no-verify": [
            *(*GPTCONVERT, "openai-tf", str(source), "--to", "safetensors", "--no-verify"),
            *to,
        ],
        **{
            f"hf → gguf {kind}, --no-verify": [
                *(*GPTCONVERT, "hf", str(hf), "--to", "gguf", "--gguf-type", kind, "--no-verify"),
                *to,
            ]
            for kind in ("f16", "f32")
        },
        "openai-tf → tf, --no-verify": [*GPTCONVERT, "openai-tf", str(source), "--to", "tf", "--no-verify", *to],
        "openai-tf → onnx, verified": [*GPTCONVERT, "openai-tf", str(source), *to],
        "hf → onnx, verified": [*GPTCONVERT, "hf", str(hf), *to],
    }
    runs = interleaved(commands, rounds, output, ballast=weights if memory_at_hand else None)
    shutil.rmtree(hf)
    return _table(f"{size} ({weights.stat().st_size / 1e9:.2f} GB)", runs, base="cp")


def latencies(size: str, data: Path) -> str:
    """Startup latency: wall time of commands that read no weights."""
    source = openai_checkpoint(size, data)
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "--help": [*GPTCONVERT, "--help"],
        "inspect": [*GPTCONVERT, "inspect", str(source)],
    }
    return _table(f"latency ({size})", interleaved(commands, 7), base="python -c pass")


def _table(title: str, runs: dict[str, list[Run]], base: str) -> str:
    lines = [f"| {title} | seconds, median [min–max] | × {base} | RssAnon peak, MiB | RssFile peak, MiB |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, measured in runs.items():
        times = [run.seconds for run in measured]
        memory = f"{max(r.anon_mib for r in measured):.0f} | {max(r.file_mib for r in measured):.0f}"
        ratio = median_ratio(measured, runs[base])
        lines.append(f"| {name} | {median(times):.2f} [{min(times):.2f}–{max(times):.2f}] | {ratio:.2f} | {memory} |")
    return "\n".join(lines)


def speeds(size: str, data: Path, peers: dict[str, Path]) -> str:
    """Decode and prefill rates of the exported graph."""
    source, export = openai_checkpoint(size, data), data / f"{size}-export"
    shutil.rmtree(export, ignore_errors=True)
    both = ["--to", "onnx", "--to", "safetensors"]
    interleaved({"": [*GPTCONVERT, "openai-tf", str(source), *both, "--no-verify", "-o", str(export)]}, 1)
    try:
        return report(export, SIZES[size], peers)
    finally:
        shutil.rmtree(export)


def main() -> None:
    """Run the benchmarks and print their tables."""
    for name, program in {"batch": batch.main, "scale": scale.main, "variants": variants.main}.items():
        if sys.argv[1:2] == [name]:
            program(sys.argv[2:])
            return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["124M", "1558M"], choices=SIZES)
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).parent / "data", help="directory for checkpoints and exports"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command")
    parser.add_argument(
        "--memory-at-hand", action="store_true", help="provide free memory before each run instead of resting"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=GRAPH", help="time another export too")
    given = parser.parse_args()
    peers = {name: Path(path) for name, path in (peer.split("=", 1) for peer in given.peer)}
    print(latencies(given.sizes[-1], given.data), end="\n\n", flush=True)
    for size in given.sizes:
        table = conversions(size, given.data, given.rounds, memory_at_hand=given.memory_at_hand)
        print(table, end="\n\n", flush=True)
    print(f"124M, tokens per second (× = gptconvert / other)\n\n{speeds('124M', given.data, peers)}", flush=True)


if __name__ == "__main__":
    main()
