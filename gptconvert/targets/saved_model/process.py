"""The client of :mod:`.worker`: one TensorFlow process, with requests in JSON and arrays in files."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from gptconvert.errors import UnsupportedError, install_hint
from gptconvert.model.tensors import Array

WORKER = "gptconvert.targets.saved_model.worker"
#: Seconds between two checks for cancellation while waiting for an answer.
POLL_SECONDS = 0.1


class TensorFlowError(Exception):
    """TensorFlow failed, or its process died; the message is one line."""


def require_tensorflow() -> None:
    """Raise :class:`UnsupportedError` unless TensorFlow is installed; do not import it."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UnsupportedError(
            "TensorFlow is not installed, but is needed to build and run SavedModels",
            hint=install_hint("tf"),
        )


class TensorFlowProcess:
    """A TensorFlow process; use as a context manager.

    Attributes:
        directory: for files exchanged with the process; removed at the end.
    """

    def __init__(self) -> None:
        require_tensorflow()
        self._temporary = tempfile.TemporaryDirectory(prefix="gptconvert-tf-")
        self.directory = self._temporary.name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(self.directory),
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process and remove its directory."""
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._temporary.cleanup()

    def ask(self, command: str, stop: threading.Event | None = None, **request: object) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            TensorFlowError: the request failed, or was cancelled by setting ``stop``.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # both are pipes, see above
        try:
            print(json.dumps({"command": command, **request}), file=stdin, flush=True)
            while stop is not None and not select.select([stdout], [], [], POLL_SECONDS)[0]:
                if stop.is_set():
                    raise TensorFlowError("the request to TensorFlow was cancelled")
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise TensorFlowError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            message = " ".join(answer["message"].split())[:400]
            raise TensorFlowError(f"TensorFlow {answer['tensorflow']}: {answer['kind']}: {message}")
        return answer

    def run(self, signature: str, inputs: Mapping[str, Array], wanted: tuple[str, ...] = ()) -> dict[str, Array]:
        """Run a signature of the loaded model; return the outputs in ``wanted``, or all.

        Raises:
            TensorFlowError: the run failed.
        """
        feeds, results = (os.path.join(self.directory, name) for name in ("inputs.npz", "outputs.npz"))
        np.savez(feeds, **inputs)  # type: ignore[arg-type]
        self.ask("run", signature=signature, inputs=feeds, outputs=results, wanted=wanted)
        with np.load(results, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def step(self, ids: Sequence[int]) -> Array:
        """Logits [V] after ``ids``, which continue the ids of earlier steps.

        Raises:
            TensorFlowError: the run failed.
        """
        results = os.path.join(self.directory, "outputs.npz")
        self.ask("step", ids=list(ids), outputs=results)
        with np.load(results, allow_pickle=False) as arrays:
            logits: Array = arrays["logits"]
        return logits

    def _last_words(self) -> str:
        """How the process ended, and the last line of its log."""
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the TensorFlow process {how}" + (f": {lines[-1].strip()[:400]}" if lines else "")


def _environment(directory: str) -> dict[str, str]:
    """The worker's environment: quiet, no accelerator, the same gptconvert, a fixed hash seed.

    Keras's settings and AutoGraph's generated code, which TensorFlow would leave in the user's home and in the
    system's temporary directory, go to ``directory``.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    fixed = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONHASHSEED": "0", "PYTHONPATH": path}
    return {**os.environ, **fixed, "KERAS_HOME": directory, "TMPDIR": directory}
