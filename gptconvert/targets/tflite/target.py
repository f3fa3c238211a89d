"""The target ``tflite``."""

from gptconvert.targets.target import Target
from gptconvert.targets.tflite import card, plan, run, verify

TARGET = Target(
    name=plan.NAME,
    title="LiteRT (TensorFlow Lite)",
    short_title="LiteRT",
    plan=plan.plan,
    verify=verify.verify,
    load=run.LiteRuntime,
    snippets=card.SNIPPETS,
    graphs=card.graphs,
    library="tflite",
    requires=(("tensorflow", "tf"), ("ai_edge_litert", "tflite")),
    libraries=("tensorflow",),
    loses_less="--tflite-type f16",
)
