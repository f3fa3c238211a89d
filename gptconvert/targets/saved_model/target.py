"""The target ``tf``."""

from gptconvert.targets.saved_model import plan, run, verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=plan.NAME,
    title="TensorFlow SavedModel",
    plan=plan.plan,
    verify=verify.verify,
    load=run.TensorFlowRuntime,
    requires=(("tensorflow", "tf"),),
    libraries=("tensorflow",),
)
