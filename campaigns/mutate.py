"""Mutation fuzzing: damage copies of the fixtures of every source format, and open them.

:mod:`campaigns.judge` defines the allowed outcomes.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from campaigns import judge
from campaigns.mutations import mutate
from campaigns.report import Case, Report
from gptconvert.containers.untrusted import boundary
from gptconvert.inspection import inspect, open_checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.package.tokenizer import tokenizer_files

FIXTURES = Path(__file__).parents[1] / "fixtures"
#: Checkpoint → the format that a command names, or None to detect it, and options that open it.
SOURCES: Mapping[str, tuple[str | None, dict[str, Any]]] = {
    **{
        f"tiny-gpt2/{name}": (None, {}) for name in ("hf-safetensors", "hf-safetensors-sharded", "hf-bare", "hf-bf16")
    },
    **{f"tiny-gpt2/{name}": ("hf", {}) for name in ("hf-bin", "hf-bin-legacy", "hf-bin-sharded", "hf-variant")},
    **{f"originals/{name}": ("hf", {}) for name in ("h5-gpt2", "flax-gpt2", "flax-gpt-neo")},
    **{f"tiny-gpt2/{name}": (None, {}) for name in ("openai-tf", "openai-tf-adam", "openai-tf-partitioned")},
    **{f"tiny-gpt2/{name}": ("openai-tf", {}) for name in ("openai-tf-bf16", "openai-tf-sharded")},
    "gpt2-stdlib": ("openai-tf", {}),
    "originals/gpt1": ("openai-gpt1", {"n_head": 3}),
    "originals/gguf": (None, {}),
    "originals/llmc": (None, {}),
    "originals/megatron": ("megatron", {}),
    "originals/mesh-jax": ("mesh-jax", {}),
    "originals/mesh-tf": ("mesh-tf", {}),
    "originals/nanogpt": ("nanogpt", {}),
    "originals/nanogpt-old": (None, {}),
    "originals/neox-pipeline": ("neox", {}),
    "originals/neox-sequential": ("neox", {}),
}
#: Largest tensor that is read, in bytes.
MAX_READ = 1 << 20


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over.

    Args:
        seed: of the cases.
        seconds: wall time.
        start: number of the first case.
        only: run this case alone, and print the traceback of its error.
    """
    report, end = Report("mutate", seed, next=start), time.monotonic() + seconds
    if only is not None:
        report.add(run_case(seed, only, debug=True))
        return report
    while time.monotonic() < end:
        for case in judge.in_child(run_case, seed, report.next, end):
            report.add(case)
    return report


def run_case(seed: int, number: int, *, debug: bool = False) -> Case:
    """Damage a fixture and open it."""
    dice = random.Random(f"{seed}:{number}")
    name = dice.choice(list(SOURCES))
    format, options = SOURCES[name]
    with tempfile.TemporaryDirectory(dir=judge.MEMORY_FOLDER) as root:
        folder = Path(root) / "model"
        shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("golden.npz"))
        what = " + ".join(mutate(dice, folder) for _ in range(dice.choice((1, 1, 1, 2))))
        path = _entry(folder, dice)
        started = time.process_time()
        chosen = dice.choice((format, None))
        outcome = judge.outcome_of(lambda: _use(path, chosen, Options(**options)), debug=debug)
        seconds = time.process_time() - started
    if seconds > judge.MAX_SECONDS and judge.is_allowed(outcome):
        outcome = f"slow: {seconds:.1f} s"
    return Case(number, f"{name}, {what}", outcome, seconds, not judge.is_allowed(outcome))


def _entry(folder: Path, dice: random.Random) -> Path:
    """The path to open: the directory, or the only kind of file that some formats have."""
    files = sorted(folder.glob("gpt2_*.bin"))
    return dice.choice(files) if files else folder


def _use(path: Path, format: str | None, options: Options) -> None:
    """Open a checkpoint, describe it, and read its small tensors and its tokenizer."""
    checkpoint = open_checkpoint(path, options, format=format)
    for weight in checkpoint.weights.values():
        if weight.nbytes <= MAX_READ:
            weight.read()
    with boundary(path, "a tokenizer"):
        tokenizer_files(checkpoint)
    if format is None:
        inspect(path, options)
