"""The target ``onnx``."""

from gptconvert.targets.onnx.card import SNIPPETS
from gptconvert.targets.onnx.continuation import check_continuation
from gptconvert.targets.onnx.plan import NAME, plan
from gptconvert.targets.onnx.run import OnnxRuntime
from gptconvert.targets.onnx.verify import verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=NAME,
    title="ONNX",
    short_title="ONNX",
    plan=plan,
    verify=verify,
    load=OnnxRuntime,
    check_continuation=check_continuation,
    snippets=SNIPPETS,
    library="onnx",
    libraries=("onnx", "onnx_ir"),
)
