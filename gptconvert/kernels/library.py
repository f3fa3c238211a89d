"""Imports onnxruntime without its telemetry."""

from __future__ import annotations

import os
from typing import Any

#: onnxruntime reads it when it is imported.
NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """onnxruntime, with telemetry off unless the user's environment says otherwise.

    Its official builds for Linux and macOS (since 1.29) store a device id in the home directory and send events to
    Microsoft: not what a user of ``--offline`` or of a CI job expects. Has no effect if the program has already
    imported onnxruntime.
    """
    os.environ.setdefault(NO_TELEMETRY, "1")
    import onnxruntime

    return onnxruntime
