"""The entry point: ``gptconvert`` and ``python -m gptconvert``."""

from __future__ import annotations

import os
import sys

#: Commands that publish nothing and map no weights. They need no supervisor, and start faster without it.
UNSUPERVISED = ("inspect", "formats", "schema", "generate")


def main() -> None:
    """Run the command line; commands that publish or map weights run in a supervised child process."""
    _open_missing_streams()
    if _needs_supervisor(sys.argv[1:]):
        from gptconvert import supervisor

        supervisor.supervise(_command)
    sys.exit(_command())


def _command() -> int:
    """Run the command line; without click, which it is built on, say so. Returns the exit code."""
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


def _needs_supervisor(arguments: list[str]) -> bool:
    """Whether the command may publish or map weights.

    Only on Linux: elsewhere, forking is unsafe with system libraries, and a child cannot be made to end with its
    parent.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    shows_help = not {"-h", "--help"}.isdisjoint(arguments)
    return sys.platform == "linux" and command not in (None, *UNSUPERVISED) and not shows_help


def _open_missing_streams() -> None:
    """Open the null device in place of standard streams that the caller closed.

    Otherwise the next files to be opened would become standard streams, and receive the messages of libraries.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (until the process ends)


if __name__ == "__main__":
    main()
