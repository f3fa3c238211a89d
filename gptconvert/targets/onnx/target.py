"""The target ``onnx``."""

from gptconvert.targets.onnx import card, card_graphs, continuation, plan, run, verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=plan.NAME,
    title="ONNX",
    plan=plan.plan,
    verify=verify.verify,
    load=run.OnnxRuntime,
    check_continuation=continuation.check_continuation,
    snippets=card.SNIPPETS,
    graphs=card_graphs.graphs,
    library="onnx",
    libraries=("onnx", "onnx_ir"),
    loses_less="--calibrate self, a smaller --block-size or q8",
)
