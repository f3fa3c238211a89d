"""``python -m benchmarks scale``: memory and time of a conversion against the number of layers, at 6B or 20B shapes.

The last column matters: growth by a layer's size per added layer would mean that the whole model is held in memory.
Checkpoints are random and created in turn; the disk holds one of them and its export at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.checkpoints import LARGE, Large
from benchmarks.measure import Run, run

MODES: dict[str, list[str]] = {"unverified": ["--no-verify"], "verified": []}
#: Free disk space required besides the checkpoint and its export.
SPARE_BYTES = 512 << 20


def main(
    arguments: Sequence[str], model_of: Callable[[str, str, int], Large] = Large, spare_bytes: int = SPARE_BYTES
) -> None:
    """Measure and print one row at a time. ``model_of(family, source, layers)`` is the model to measure."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if (given.family, given.source) == ("gpt_neox", "mesh-jax"):
        parser.error("--source mesh-jax requires --family gptj")
    models = [model_of(given.family, given.source, layers) for layers in sorted(given.layers)]
    _require_space(2 * models[-1].nbytes + spare_bytes, given.data)
    title = f"layers of {given.family}, {given.source} → {given.to}, bfloat16"
    print(f"| {title} | GB | seconds | RssAnon peak, MiB | RssFile peak, MiB | MiB per added layer |")
    print("|" + " --- |" * 6, flush=True)
    before: dict[str, tuple[int, float]] = {}
    for model in models:
        for mode, measured in _measure(model, given.mode, given.to, given.data):
            growth = "–"
            if mode in before:
                layers, peak = before[mode]
                growth = f"{(measured.anon_mib - peak) / (model.layers - layers):+.1f}"
            before[mode] = model.layers, measured.anon_mib
            figures = f"{model.nbytes / 1e9:.2f} | {measured.seconds:.1f} | {measured.anon_mib:.0f}"
            print(f"| {model.layers} × {mode} | {figures} | {measured.file_mib:.0f} | {growth} |", flush=True)


def _measure(model: Large, modes: Sequence[str], to: str, data: Path) -> Iterator[tuple[str, Run]]:
    """Run one conversion in each mode, and remove all files afterwards."""
    source, output = data / f"{model.family}-{model.layers}-{model.source}", data / "out"
    try:
        model.write(source)
        for mode in modes:
            shutil.rmtree(output, ignore_errors=True)
            os.sync()  # keep earlier writes out of the measured time
            command = [sys.executable, "-m", "gptconvert", model.source, str(source), "--to", to, "-o", str(output)]
            measured = run([*command, *MODES[mode], "-q"])
            if measured.code:
                raise SystemExit(f"{' '.join(command)} exited with {measured.code}:\n{measured.output}")
            yield mode, measured
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)


def _require_space(nbytes: int, data: Path) -> None:
    data.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(data).free
    if free < nbytes:
        raise SystemExit(
            f"{data}: not enough disk space; expected {nbytes / 1e9:.1f} GB, found {free / 1e9:.1f} GB\n"
            "hint: pass fewer --layers, or another directory with --data"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4], help="GPT-J 6B has 28, NeoX-20B 44")
    parser.add_argument("--family", choices=LARGE, default="gptj")
    parser.add_argument("--source", choices=["hf", "mesh-jax"], default="hf", help="mesh-jax: GPT-J only")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--to", choices=["onnx", "safetensors", "tf"], default="onnx")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data", help="directory for files")
    return parser
