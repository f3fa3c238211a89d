"""Output formats: a checkpoint → planned files. Nothing here knows where the checkpoint came from."""

from collections.abc import Mapping

#: ``--to`` name → module that holds its ``TARGET``; imported when it is asked for.
TARGETS: Mapping[str, str] = {
    "onnx": "gptconvert.targets.onnx.model",
    "safetensors": "gptconvert.targets.safetensors",
    "tf": "gptconvert.targets.saved_model.model",
    "openai-tf": "gptconvert.targets.openai_tf",
}
