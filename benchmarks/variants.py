"""``python -m benchmarks variants``: speed, size and conversion of the smaller and faster graphs at 124M.

Every graph is timed in turn with the float32 graph of the same export, with that graph loaded a second time (the A/A
control) and with the peers: other exports (``--peer NAME=GRAPH``) and llama.cpp, if ``gguf`` and ``xllamacpp`` are
installed. Rates are medians; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import llama
from benchmarks.checkpoints import SIZES, openai_checkpoint
from benchmarks.measure import Run, interleaved, median_ratio
from benchmarks.speed import CASES, PAUSE_SECONDS, STEPS, onnx_session, onnx_step

GPTCONVERT = [sys.executable, "-m", "gptconvert"]
VARIANTS = ["--quantize", "q8", "--quantize", "q4"]
#: Row → graph of the export; the second is the control.
GRAPHS = {
    "fp32": "model.onnx",
    "fp32 again (A/A)": "model.onnx",
    "fp32, last token": "model_last_token.onnx",
    "fp32, in place": "model_in_place.onnx",
    "q8": "model_quantized.onnx",
    "q8, in place": "model_quantized_in_place.onnx",
    "q4": "model_q4.onnx",
    "q4, in place": "model_q4_in_place.onnx",
}
#: Quick cases, for tests of the program.
QUICK = {"decode at 8": (8, 1, 1), "prefill of 8": (0, 8, 1)}
#: Returns tokens per second of one round.
Measure = Callable[[], float]


@dataclass(frozen=True)
class Way:
    """How to measure.

    Attributes:
        shape: layers, heads and head size of the model.
        context: tokens of the in-place graphs' buffers.
        vocab: number of token ids.
        past: cached tokens.
        new: tokens of a run.
        processor: whether to count the processor time of one thread, instead of the time on all cores.
    """

    shape: tuple[int, int, int]
    context: int
    vocab: int
    past: int
    new: int
    processor: bool

    @property
    def threads(self) -> int:
        """0 for one per core."""
        return int(self.processor)

    @property
    def runs(self) -> int:
        """Runs that are timed together."""
        return STEPS if self.new == 1 else 1

    def step(self, path: Path) -> Callable[[], object]:
        """One run of a graph whose cache grows."""
        return onnx_step(path, self.past, self.new, *self.shape, vocab=self.vocab, threads=self.threads)

    def timed(self, run: Callable[[], object], runs: int | None = None) -> Measure:
        """Measures ``runs`` calls of ``run``, after one that is not counted."""
        clock = time.process_time if self.processor else time.perf_counter
        runs = self.runs if runs is None else runs

        def measure() -> float:
            run()
            start = clock()
            for _ in range(runs):
                run()
            return self.new * self.runs / (clock() - start)

        return measure


def in_place_step(path: Path, way: Way) -> Callable[[], object]:
    """One run of an in-place graph, whose keys and values stay in buffers that are bound once.

    The buffers are kept for as long as the returned function.
    """
    import onnxruntime

    session, random = onnx_session(path, way.threads), np.random.default_rng(0)
    binding, (layers, heads, head_dim), buffers = session.io_binding(), way.shape, []
    for i in range(layers):
        for part in ("key", "value"):
            filled = random.standard_normal((1, heads, way.context, head_dim), dtype=np.float32)
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(filled)
            binding.bind_ortvalue_input(f"past_key_values.{i}.{part}", buffer)
            binding.bind_ortvalue_output(f"present.{i}.{part}", buffer)
            buffers.append((filled, buffer))
    binding.bind_output("logits")
    feed = {
        "input_ids": random.integers(0, way.vocab, (1, way.new)),
        "attention_mask": np.ones((1, way.past + way.new), np.int64),
        "position_ids": np.arange(way.past, way.past + way.new)[None],
    }

    def step() -> object:
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        session.run_with_iobinding(binding)
        return buffers, binding.get_outputs()[-1].numpy()  # as bound: the logits last

    return step


def engines(onnx: Path, way: Way, peers: Mapping[str, Path], ggufs: Mapping[str, Path]) -> dict[str, Measure]:
    """Name → measurement, for every graph and peer."""
    found: dict[str, Measure] = {}
    for name, file in GRAPHS.items():
        if file.endswith("_in_place.onnx"):
            found[name] = way.timed(in_place_step(onnx / file, way))
        elif way.past == 0 or "last_token" not in file:  # decoding, it computes the same as its sibling
            found[name] = way.timed(way.step(onnx / file))
    for name, path in peers.items():
        found[name] = way.timed(way.step(path))
    for name, path in ggufs.items():
        served = llama.Llama(path, way.threads or os.cpu_count() or 1)
        found[name] = way.timed(served.step(way.past, way.runs * way.new), 1)
    return found


def in_turn(measures: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Rates per engine, measured in turn; each rests before, because other engines' threads spin for a while."""
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for measure in measures.values():
        measure()
    for _ in range(rounds):
        for name, measure in measures.items():
            time.sleep(PAUSE_SECONDS)
            rates[name].append(measure())
    return rates


def speeds(
    export: Path,
    hparams: Mapping[str, int],
    peers: Mapping[str, Path],
    ggufs: Mapping[str, Path],
    cases: Mapping[str, tuple[int, int, int]] = CASES,
    *,
    processor: bool = False,
) -> str:
    """A table with a row per graph: median rate, its spread, and its ratio to fp32."""
    names, shape = (
        [*GRAPHS, *peers, *ggufs],
        (hparams["n_layer"], hparams["n_head"], hparams["n_embd"] // hparams["n_head"]),
    )
    cells: dict[str, list[str]] = {name: [] for name in names}
    for past, new, rounds in cases.values():
        way = Way(shape, hparams["n_ctx"], hparams["n_vocab"], past, new, processor)
        rates = in_turn(engines(export / "onnx", way, peers, ggufs), rounds)
        for name in names:
            cells[name].append(_rate(rates[name], rates["fp32"]) if name in rates else "–")
    sizes = {name: _size(export / "onnx" / file) for name, file in GRAPHS.items()}
    sizes |= {name: _size(path) for name, path in (*peers.items(), *ggufs.items())}
    head = ["graph", "MB", *(f"{case}, tokens/s" for case in cases)]
    return _table([head, *([name, f"{sizes[name] / 1e6:.1f}", *cells[name]] for name in names)])


def _rate(rates: Sequence[float], base: Sequence[float]) -> str:
    """``95.2 [90.1–99.0] (×2.31)``: median, quartiles, ratio to the base."""
    low, high = np.percentile(rates, (25, 75))
    ratio = median(a / b for a, b in zip(rates, base, strict=True))
    return f"{median(rates):.1f} [{low:.1f}–{high:.1f}] (×{ratio:.2f})"


def _size(path: Path) -> int:
    """Bytes of a graph and its weights."""
    data = path.with_name(f"{path.name}_data")
    for kind in ("_last_token", "_in_place"):  # these share their sibling's data file
        data = data if data.exists() else data.with_name(data.name.replace(kind, ""))
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def conversions(source: Path, data: Path, rounds: int) -> str:
    """Wall time and memory of writing the variants, interleaved with ``cp`` of the source."""
    output, weights = data / "out", source / "model.ckpt.data-00000-of-00001"
    start = [*GPTCONVERT, "openai-tf", str(source), "--to", "onnx", "-q", "-o", str(output / "export")]
    commands = {
        "cp": ["cp", str(weights), str(output)],
        "fp32 + q8 + q4, --no-verify": [*start, *VARIANTS, "--no-verify"],
        "fp32 + q8 + q4, verified": [*start, *VARIANTS],
    }
    runs = interleaved(commands, rounds, output)
    head = ["conversion", "seconds, median [min–max]", "× cp", "RssAnon peak, MiB"]
    return _table([head, *(_conversion(name, runs[name], runs["cp"]) for name in commands)])


def _conversion(name: str, runs: list[Run], base: list[Run]) -> list[str]:
    seconds = [run.seconds for run in runs]
    spread = f"{median(seconds):.1f} [{min(seconds):.1f}–{max(seconds):.1f}]"
    return [name, spread, f"{median_ratio(runs, base):.1f}", f"{max(run.anon_mib for run in runs):.0f}"]


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str]) -> None:
    """Measure and print the tables."""
    given = _parser().parse_args(arguments)
    source, export = openai_checkpoint(given.size, given.data), given.data / f"{given.size}-variants"
    if not given.no_conversion:
        print(conversions(source, given.data, given.rounds), end="\n\n", flush=True)
    if not export.exists():
        kinds = [*VARIANTS, "--last-token", "--in-place", "--no-verify", "-q", "-o", str(export)]
        interleaved({"": [*GPTCONVERT, "openai-tf", str(source), "--to", "onnx", *kinds]}, 1)
    absent = llama.missing()
    if absent:
        print(f"llama.cpp is not timed: {', '.join(absent)} not installed", file=sys.stderr)
    ggufs = {} if absent else {f"llama.cpp {k}": llama.gguf_file(source, k, given.data) for k in llama.TYPES}
    peers = {name: Path(path) for name, path in (peer.split("=", 1) for peer in given.peer)}
    cases = QUICK if given.quick else CASES
    print(speeds(export, SIZES[given.size], peers, ggufs, cases, processor=given.processor_time), flush=True)
    if not given.keep:
        shutil.rmtree(export)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks variants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data", help="directory for files")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each conversion")
    parser.add_argument("--no-conversion", action="store_true", help="time the graphs only")
    parser.add_argument("--quick", action="store_true", help="one short round, to try the program")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="run on one thread and count its processor time, on a machine that other programs use",
    )
    parser.add_argument("--keep", action="store_true", help="keep the export for the next run")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=GRAPH", help="time another export too")
    return parser
