"""The parent's side: starts a child process, asks it, and ends it if it exceeds its limits."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Self

from gptconvert.errors import UnsafeInputError
from gptconvert.model.tensors import Array
from gptconvert.targets.child.frames import Arrays, FrameError, read_message, write_message
from reference_model.config import GPTConfig

CONFINE = "gptconvert.targets.child.confine"
#: Seconds between two checks for cancellation while waiting for an answer.
POLL_SECONDS = 0.1
#: Last bytes of the child's log that are kept.
LOG_BYTES = 1 << 16
#: Memory of any child: the libraries, their threads, and small graphs. TensorFlow takes 0.4 GiB of it.
MEMORY = 2 << 30
#: Copies of the weights, and of the largest values per token, that a runtime may need.
WEIGHT_COPIES, VALUE_COPIES = 4, 8
#: Memory per byte of graph file, and the largest file that counts: three times that of the largest GPT.
GRAPH_FACTOR, MOST_GRAPH = 64, 16 << 20
#: Time for any request; more per byte of graph, which is optimised or compiled on first use; and per multiplication
#: (1 GFLOP/s, a fiftieth of one core's speed).
SECONDS, SECONDS_PER_GRAPH_BYTE, SECONDS_PER_PRODUCT = 60.0, 60 / (1 << 20), 2e-9

#: Lines that Rust prints about the panic itself.
_ABOUT_PANICS = re.compile(r"RUST_BACKTRACE|panicked at|non-unwinding panic|stack backtrace|^ +(?:\d+:|at )")


class ChildError(Exception):
    """A request failed, or the process died; the message is one line."""


@dataclass(frozen=True)
class Limits:
    """What a graph of unknown origin may use, in proportion to its size and the model's.

    Attributes:
        path: the artifact, for messages.
        memory: bytes.
        weight_bytes: of its weights.
        graph_bytes: of its graph.
    """

    path: str
    memory: int
    weight_bytes: int
    graph_bytes: int

    @classmethod
    def of(cls, path: str, weight_bytes: int, graph_bytes: int, config: GPTConfig | None, tokens: int) -> Self:
        """Limits for runs of at most ``tokens`` tokens; without ``config``, whatever fits the weights."""
        values = 0 if config is None else config.vocab_size + 16 * config.n_embd + config.n_head * config.n_ctx
        graph_bytes = min(graph_bytes, MOST_GRAPH)
        memory = MEMORY + WEIGHT_COPIES * weight_bytes + GRAPH_FACTOR * graph_bytes
        memory += VALUE_COPIES * 4 * tokens * values
        return cls(path, memory, weight_bytes, graph_bytes)

    def seconds(self, tokens: int) -> float:
        """Time for one request that computes ``tokens`` tokens."""
        products = self.weight_bytes / 4 * (tokens + 32)  # loading costs as much as a few tokens
        return SECONDS + SECONDS_PER_GRAPH_BYTE * self.graph_bytes + SECONDS_PER_PRODUCT * products


class ChildProcess:
    """A process that answers requests; use as a context manager.

    Args:
        limits: for a graph of unknown origin; None for our own, which runs without limits.
        variables: added to its environment.

    Attributes:
        module: the program, which calls :func:`.server.serve`.
        program: its name in messages.
        subject: what it runs, in messages.
        error: raised if a request fails.
    """

    module: ClassVar[str]
    program: ClassVar[str]
    subject: ClassVar[str] = "graph"
    error: ClassVar[type[ChildError]] = ChildError

    def __init__(self, limits: Limits | None = None, variables: Mapping[str, str] | None = None) -> None:
        self.limits, self._expired = limits, False
        memory = [] if limits is None else [str(limits.memory)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", CONFINE, self.module, *memory],  # -P: no modules of the current directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # not a file: a confined process cannot write files
            env={**_environment(), **(variables or {})},
        )
        self._log: deque[bytes] = deque()
        self._logging = threading.Thread(target=self._keep_log, daemon=True)
        self._logging.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        self._logging.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                _close(stream)

    def call(
        self,
        command: str,
        stop: threading.Event | None = None,
        arrays: Arrays | None = None,
        tokens: int = 0,
        **request: object,
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Send one request, which computes ``tokens`` tokens, and wait for its answer.

        Raises:
            ChildError: the request failed, or was cancelled by setting ``stop``.
            UnsafeInputError: a confined process exceeded its time, or died.
        """
        timer = None
        if self.limits is not None:
            timer = threading.Timer(self.limits.seconds(tokens), self._expire)
            timer.daemon = True
            timer.start()
        try:
            answer = self._exchange({"command": command, **request}, arrays or {}, stop)
        finally:
            if timer is not None:
                timer.cancel()
        if answer is None:
            raise self._died(tokens)
        if not answer[0]["ok"]:
            raise self.error(self.failure(answer[0]))
        return answer

    def failure(self, answer: Mapping[str, Any]) -> str:
        """The message of a failed request."""
        return f"{answer['program']}: {answer['kind']}: {' '.join(answer['message'].split())[:400]}"

    def _exchange(
        self, request: Mapping[str, object], arrays: Arrays, stop: threading.Event | None
    ) -> tuple[dict[str, Any], dict[str, Array]] | None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # both are pipes, see above
        try:
            write_message(stdin, request, arrays)  # type: ignore[arg-type]
            while stop is not None and not select.select([stdout], [], [], POLL_SECONDS)[0]:
                if stop.is_set():
                    raise self.error(f"the request to {self.program} was cancelled")
            return read_message(stdout, self.limits and self.limits.memory)  # type: ignore[arg-type]
        except BrokenPipeError:
            return None
        except FrameError as error:
            self._process.kill()
            raise self.error(f"the {self.program} process sent an invalid answer: {error}") from error

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()

    def _died(self, tokens: int) -> Exception:
        """The error for a process that ended before it answered."""
        if self.limits is None:
            return self.error(self._last_words())
        if self._expired:
            message = f"the {self.subject} does not end in time, so it was stopped"
            expected = f"at most {self.limits.seconds(tokens):.0f} s for a request"
            return UnsafeInputError(message, path=self.limits.path, expected=expected)
        return UnsafeInputError(
            f"the {self.subject} ended the process that ran it: {self._last_words()}",
            path=self.limits.path,
            expected=f"a {self.subject} that runs within {self.limits.memory} bytes of memory",
        )

    def _keep_log(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        for line in iter(lambda: stream.readline(1 << 12), b""):
            self._log.append(line)
            while len(self._log) * (1 << 12) > LOG_BYTES:
                self._log.popleft()

    def _last_words(self) -> str:
        """How the process ended, and the last line of its log."""
        status = self._process.wait()
        self._logging.join()
        lines = b"".join(self._log).decode("utf-8", "replace").strip().splitlines()
        lines = [line for line in lines if not _ABOUT_PANICS.search(line)]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the {self.program} process {how}" + (f": {lines[-1].strip()[:400]}" if lines else "")


def _close(stream: BinaryIO | Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # a request was not read to its end
        stream.close()


def _environment() -> dict[str, str]:
    """The child's environment: quiet, no accelerator, the same gptconvert, a fixed hash seed."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    fixed = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": path,
    }
    return {**os.environ, **fixed}
