"""Convert GPT checkpoints to artifacts that run elsewhere, and prove that each computes the same."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from gptconvert import errors

if TYPE_CHECKING:
    from gptconvert.families import Request
    from gptconvert.inspection import inspect, open_checkpoint
    from gptconvert.pipeline import Options, convert, verify_export
    from gptconvert.sources.source import OpenOptions
    from gptconvert.targets.plan import TargetOptions

__all__ = [
    "OpenOptions",
    "Options",
    "Request",
    "TargetOptions",
    "convert",
    "errors",
    "inspect",
    "open_checkpoint",
    "verify_export",
]

_HOMES = {
    "OpenOptions": "gptconvert.sources.source",
    "Options": "gptconvert.pipeline",
    "Request": "gptconvert.families",
    "TargetOptions": "gptconvert.targets.plan",
    "convert": "gptconvert.pipeline",
    "inspect": "gptconvert.inspection",
    "open_checkpoint": "gptconvert.inspection",
    "verify_export": "gptconvert.pipeline",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: ``import gptconvert`` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
