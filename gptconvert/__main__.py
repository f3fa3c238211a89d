"""The entry point: ``gptconvert`` and ``python -m gptconvert``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without click, which it is built on, say so."""
    try:
        import click  # noqa: F401
    except ModuleNotFoundError:
        sys.stderr.write("error: the Python package click is not installed\n  hint: pip install click\n")
        sys.exit(4)
    from gptconvert.cli import main as run

    run()


if __name__ == "__main__":
    main()
