"""Locates an error: the first block whose output exceeds rounding noise.

Our graphs name every block's output ``h.{i}``. A copy of the graph that returns them runs without optimisation on a
failing probe; if the copy is correct, the optimiser is at fault. Graphs without these names are judged by the keys
and values they return, or else by the kinds of probes that fail.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import Array
from gptconvert.targets.onnx.file import OnnxFile
from gptconvert.targets.onnx.runner import Binding, OnnxRunner
from gptconvert.verify.localise import Location, from_groups
from gptconvert.verify.metrics import EPSILON, Errors, Measure
from gptconvert.verify.outputs import YARDSTICKS, Group, OutputComparison
from gptconvert.verify.probes import Probe
from gptconvert.verify.run_probes import whole
from gptconvert.verify.runners import Outputs, RunError
from gptconvert.verify.truth import Truth, TruthPass, tensor_of

#: Longer probes are used only if nothing shorter fails.
MOST_TOKENS = 64


def first_bad_block(
    file: OnnxFile,
    binding: Binding,
    checkpoint: Checkpoint,
    groups: list[Group],
    replaced: Mapping[str, Array] | None = None,
) -> Location | None:
    """Where the error of the failing ``groups`` begins; None if no whole probe reproduces it.

    ``replaced`` is the content of tensors that differs from the file's.
    """
    failing = [probe for group in groups if not group.ok for probe in group.probes]
    if not failing:
        return None
    # More tokens expose more errors (attention over one token is always right), but cost more.
    probe = max(failing, key=lambda p: (p.tokens <= MOST_TOKENS, p.tokens))
    config = checkpoint.config
    values = {name for node in file.model.graph.node for name in node.output}
    taps = [name for name in ("embedding", *(f"h.{i}" for i in range(config.n_layer))) if name in values]
    runner = OnnxRunner(file, binding, config, optimise=False, taps=taps, tokens=probe.input_ids.size)
    runner = runner.with_weights(replaced) if replaced else runner
    truth = TruthPass(
        checkpoint, [probe], binding.compute, presents=runner.kv_cache, taps=True, yardsticks=YARDSTICKS
    ).run()
    try:
        outputs = whole(runner, probe, config)
    except RunError:
        return None
    found: dict[str, Group] = {}
    OutputComparison({(probe, False): outputs}, binding.compute, truth, config, found).judge()
    bad = [m.tensor for group in found.values() for m in group.measures.values() if not m.ok]
    presents = sorted((name for name in bad if name.startswith("present.")), key=_layer)
    blocks = tuple(_tap(name, outputs, probe, truth) for name in taps)
    tap = next((measure.tensor for measure in blocks if not measure.ok), None)
    if tap is not None:
        return Location(_in_block(tap, presents), blocks)
    if presents:
        return Location(_from_presents(presents[0], taps), blocks)
    if not all(group.ok for group in found.values()):
        if taps:
            return Location("the head (final norm, projection) or the output's shape", blocks)
        return Location(_untapped(groups, binding))
    if any(not measure.ok for group in groups for measure in group.measures.values()):
        return Location("onnxruntime's graph optimisation: without it the same graph is correct", blocks)
    return None


def _untapped(groups: list[Group], binding: Binding) -> str:
    """Where the error begins in a graph whose blocks cannot be compared, judged by the kinds of probes that fail."""
    place = from_groups(groups)
    if place is not None and "position_ids" not in binding.inputs:
        place += " (the graph has no input position_ids)"
    if binding.presents:  # all correct
        return place or "the last block after its keys and values, or the head"
    reason = "the graph names no block's output and returns no keys or values, so no block could be compared alone"
    return f"{place or 'an unknown place'}; {reason}"


def _tap(name: str, outputs: Outputs, probe: Probe, truth: Truth) -> Measure:
    """The figures of a block's output, [B * S, D] or [B, S, D]."""
    array: Array = outputs.taps[name]
    rows = array.reshape(*probe.input_ids.shape, -1)
    measure = Measure(name, EPSILON["float32"])
    for row in truth.pack.rows:
        exact, noise = truth.values[name][row.tokens], truth.noise[name]
        measure.add(Errors.of(tensor_of(rows[row.row][row.new]), exact), noise.at(row.tokens), exact)
    return measure


def _in_block(tap: str, bad_presents: list[str]) -> str:
    """The block whose output is wrong, and which of its keys and values are."""
    if tap == "embedding":
        return "the embedding (tokens or positions)"
    layer = _layer(tap)
    own = sorted(name for name in bad_presents if _layer(name) == layer)
    return f"block {layer}" + (f", from {' and '.join(own)} on" if own else "")


def _from_presents(name: str, taps: list[str]) -> str:
    """The block whose keys or values are wrong, when no block's output is known to be wrong."""
    layer = _layer(name)
    if taps:
        return f"block {layer}: {name}, as returned"
    before = f", or block {layer - 1} after its keys and values" if layer else ", or the embedding"
    return f"block {layer}, in {name}{before}"


def _layer(name: str) -> int:
    return int(name.split(".")[1])
