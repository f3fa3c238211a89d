"""Run in a confined process: tries what a hostile graph might, and prints the outcomes as JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable


def write() -> None:
    with open("new", "w", encoding="ascii") as file:
        file.write("x")


def overwrite() -> None:
    with open("kept", "r+", encoding="ascii") as file:
        file.write("x")


def connect() -> None:
    socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), timeout=5).close()


ATTEMPTS: dict[str, Callable[[], object]] = {
    "write": write,
    "overwrite": overwrite,
    "truncate": lambda: os.truncate("kept", 0),
    "remove": lambda: os.remove("removed"),
    "rename": lambda: os.rename("renamed", "elsewhere"),
    "mkdir": lambda: os.mkdir("folder"),
    "link": lambda: os.symlink("kept", "link"),
    "run": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
    "connect": connect,
    "memory": lambda: bytearray(1 << 30),
    "read": lambda: open("kept", encoding="ascii").close(),
}

if __name__ == "__main__":
    outcomes = {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            outcomes[name] = "done"
        except (OSError, MemoryError) as error:
            outcomes[name] = type(error).__name__
    print(json.dumps(outcomes))
