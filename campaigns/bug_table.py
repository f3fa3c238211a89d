"""The table of docs/verification.md: how far outside the limits planted bugs are, measured over several models.

    python -m campaigns.bug_table

Models: one of each family with random weights, and the trained fixture. Each bug is planted in every layer in turn;
the smallest of all is shown.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from campaigns.graph_mutations import mutants
from campaigns.planted import FAMILIES, Correct, SharedRunner, remembered_truths
from gptconvert.errors import GptConvertError
from gptconvert.inspection import open_checkpoint
from gptconvert.targets.onnx.file import open_onnx
from gptconvert.targets.onnx.foreign import other_sizes, used_tensors
from gptconvert.targets.onnx.verify import Runs
from gptconvert.verify.content import match_by_content
from gptconvert.verify.replacement import replacement
from gptconvert.verify.report import RunReport
from gptconvert.verify.stress import settings_of

TRAINED = Path(__file__).parents[1] / "fixtures" / "gpt2-stdlib"
#: Bug → pattern of the mutants' names.
BUGS: Mapping[str, str] = {
    "mask value −100": r"^bias\S* \(Where\).* = -100$",
    "mask value −10000": r"^bias\S* \(Where\).* = -10000$",
    "clipping at 10⁴ after an MLP": r"mlp\.out \(Gemm\): clipped at 1e4$",
    "attention scale · 1.00001 in one layer": r"q_scaled \(Mul\): constant\S* \* 1\.00001$",
    "positions in half precision": r"^(positions|rotary\.0\.cos) \(Gather\): in half precision$",
    "epsilon · 1.001 in one norm": r"\(LayerNormalization\): epsilon (0\.010010|1\.000999|1\.00100)",
    "epsilon · 0.1 in one norm": r"\(LayerNormalization\): epsilon (9\.99|1\.0000000)\d*e-0[67]$",
    "attention scores in half precision in one layer": r"attn\.scores \(MatMul\): in half precision$",
    "the other form of GELU in one layer": r"approximate b'(none|tanh)'$",
    "a missing bias": r"\(Gemm\): no ",
    "a query that does not see itself": r"\(LessOrEqual\): Less$",
}


def models(folder: Path) -> Iterator[Correct]:
    """The models to plant bugs in."""
    for family in FAMILIES:
        yield Correct.of(family, folder / family)
    (folder / "trained").mkdir()
    yield Correct.made("trained", open_checkpoint(TRAINED), folder / "trained")


def errors(export: Correct, path: Path) -> tuple[float, float]:
    """The largest error of a graph in units of its limit: with its own weights, and with stress weights."""
    file, checkpoint = open_onnx(str(path)), export.checkpoint
    runs = Runs(file, checkpoint, None, "default", lambda name, total: lambda count: None, runner=SharedRunner)
    tensors = used_tensors(file)
    match = match_by_content(tensors, checkpoint)
    found = replacement(tensors, other_sizes(file, tensors), match, checkpoint)
    stressed = (runs.with_weights(found, setting).run() for setting in settings_of(checkpoint.config))
    return largest(runs.run()), max(map(largest, stressed))


def largest(run: RunReport) -> float:
    """The largest error in units of its limit; infinite where no figure is needed."""
    if any(group.problems for group in run.groups):
        return math.inf
    return max(measure.error_ratio for group in run.groups for measure in group.measures.values())


def main() -> None:
    """Measure and print the table."""
    found: dict[str, list[tuple[float, float]]] = {bug: [] for bug in BUGS}
    with tempfile.TemporaryDirectory() as folder, remembered_truths():
        for export in models(Path(folder)):
            for mutant in mutants(export.graph):
                for bug in (bug for bug, pattern in BUGS.items() if re.search(pattern, mutant.name)):
                    try:
                        found[bug].append(errors(export, export.write(mutant, "another exporter")))
                    except GptConvertError:
                        continue  # it cannot be loaded
    print("| bug | graphs | error / limit | with stress weights |\n| --- | --- | --- | --- |")
    for bug, measured in found.items():
        own, stressed = (min((pair[k] for pair in measured), default=math.nan) for k in (0, 1))
        print(f"| {bug} | {len(measured)} | {own:.2g} | {stressed:.2g} |")


if __name__ == "__main__":
    main()
