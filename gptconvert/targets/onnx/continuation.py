"""Checks another runtime's greedy text, token by token, against the logits of an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence

from gptconvert.targets.onnx.file import open_onnx
from gptconvert.targets.onnx.runner import OnnxRunner, bind
from gptconvert.targets.target import Candidate
from gptconvert.verify.greedy import Continuation
from gptconvert.verify.outputs import Group
from gptconvert.verify.probes import default_positions
from gptconvert.verify.runners import Feeds, RunError


def check_continuation(
    continuation: Continuation,
    candidate: Candidate,
    groups: Sequence[Group],
    runner: type[OnnxRunner] = OnnxRunner,
) -> Group:
    """The tokens of ``continuation`` that the ONNX graph rules out, as a group without figures.

    ``groups`` are the groups that the graph has passed; they define its accuracy.
    """
    group = Group(f"greedy as {candidate.shown_as}", tokens=continuation.new * len(continuation.input_ids))
    own = max(group.measures["logits"].most for group in groups if "logits" in group.measures)
    file, config = open_onnx(candidate.path, confined=candidate.export is None), candidate.checkpoint.config
    special = candidate.checkpoint.special_ids
    positions = default_positions(config.task, continuation.attention_mask, continuation.input_ids.shape[1])
    try:
        outputs = runner(file, bind(file, config), config).run(
            Feeds(continuation.input_ids, continuation.attention_mask, positions), False
        )
    except RunError as error:
        group.problems.append(f"the run failed: {error}")
        return group
    group.problems += continuation.unlikely(outputs.named["logits"], special, continuation.allowed + 2 * own)
    return group
