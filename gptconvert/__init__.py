"""Convert GPT checkpoints to other formats, and prove that they compute what the checkpoint computes."""

import os
from typing import TYPE_CHECKING, Any

from gptconvert import errors
from gptconvert.version import __version__ as __version__

# onnxruntime's telemetry looks up names, sends events and writes into the user's cache; huggingface_hub's fetches a
# list of agents. Both read their variable when they are imported: set it here, before any module of this package, in
# any process, can import them.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")

if TYPE_CHECKING:
    from gptconvert.generation.model import generate, load
    from gptconvert.generation.sampling import Sampling
    from gptconvert.inspection import inspect, open_checkpoint
    from gptconvert.model.options import Options
    from gptconvert.model.progress import Progress
    from gptconvert.pipeline import convert, plan, verify_export
    from gptconvert.quality import measure_quality

__all__ = [
    "Options",
    "Progress",
    "Sampling",
    "convert",
    "errors",
    "generate",
    "inspect",
    "load",
    "measure_quality",
    "open_checkpoint",
    "plan",
    "verify_export",
]

_MODULES = {
    "Options": "gptconvert.model.options",
    "Progress": "gptconvert.model.progress",
    "Sampling": "gptconvert.generation.sampling",
    "convert": "gptconvert.pipeline",
    "generate": "gptconvert.generation.model",
    "inspect": "gptconvert.inspection",
    "load": "gptconvert.generation.model",
    "measure_quality": "gptconvert.quality",
    "open_checkpoint": "gptconvert.inspection",
    "plan": "gptconvert.pipeline",
    "verify_export": "gptconvert.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, to keep ``import gptconvert`` fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
