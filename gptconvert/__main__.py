"""The entry point: ``gptconvert`` and ``python -m gptconvert``."""

from __future__ import annotations

import sys

from gptconvert import supervisor


def main() -> None:
    """Run the command line in a child process; without click, which it is built on, say so."""
    supervisor.supervise(_command)


def _command() -> int:
    try:
        import click  # noqa: F401
    except ModuleNotFoundError:
        sys.stderr.write("error: the Python package click is not installed\n  hint: pip install click\n")
        return 4
    from gptconvert.cli import main as run

    try:
        run()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


if __name__ == "__main__":
    main()
