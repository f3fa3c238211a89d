"""The entry point: ``gptconvert`` and ``python -m gptconvert``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; without click, which it is built on, say so."""
    _open_standard_streams()
    try:
        import click  # noqa: F401
    except ModuleNotFoundError:
        sys.stderr.write("error: the Python package click is not installed\n  hint: pip install click\n")
        sys.exit(4)
    from gptconvert.cli import main as run

    run()


def _open_standard_streams() -> None:
    """Open the null device for standard streams that the caller closed.

    Otherwise the next files would take their descriptors, and text that a library prints would end up in them.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
