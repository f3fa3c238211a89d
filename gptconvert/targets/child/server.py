"""The child's side: answers requests until the parent closes the pipe or dies."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from gptconvert.model.tensors import Array
from gptconvert.targets.child.frames import Arrays, read_message, write_message

#: A request's fields and arrays → the answer's.
Command = Callable[[Mapping[str, Any], Arrays], tuple[Mapping[str, object], Arrays]]


def serve(commands: Mapping[str, Command], program: str) -> None:
    """Answer requests from stdin on stdout.

    Args:
        commands: name → function; its exceptions become answers too.
        program: name and version of the library at work, for messages.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep prints of libraries out of the answers
    requests: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Array]]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    while True:
        fields, arrays = requests.get()
        try:
            found, results = commands[fields["command"]](fields, arrays)
            answer: dict[str, object] = {"ok": True, **found}
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # not Exception: panics of Rust libraries have a class of their own
            answer, results = {"ok": False, "kind": type(error).__name__, "message": str(error)}, {}
        write_message(answers, {**answer, "program": program}, results)
        del fields, arrays, results


def _receive(requests: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Array]]]) -> None:
    """Queue requests; end the process with the stream, even in the middle of a run."""
    while (message := read_message(sys.stdin.buffer)) is not None:
        requests.put(message)
    os._exit(0)
