"""The target ``tf``."""

from gptconvert.targets.saved_model.plan import NAME, plan
from gptconvert.targets.saved_model.run import TensorFlowRuntime
from gptconvert.targets.saved_model.verify import verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=NAME,
    title="TensorFlow SavedModel",
    short_title="TensorFlow SavedModel",
    plan=plan,
    verify=verify,
    load=TensorFlowRuntime,
    requires=(("tensorflow", "tf"),),
    libraries=("tensorflow",),
)
