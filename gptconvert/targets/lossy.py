"""Options that only lossy exports use, and their checks: the same for every target."""

from __future__ import annotations

from collections.abc import Collection

from gptconvert.errors import UsageError
from gptconvert.model.options import INFO, Options

#: Options that only quantised exports use, and only in verification.
OF_VERIFICATION = ("eval_text", "max_kl")


def check_used(options: Options, types: Collection[str], quantised: Collection[str], remedy: str) -> None:
    """Refuse options that have no effect on files of one type of weights each.

    Args:
        options: of the conversion.
        types: of the files.
        quantised: those types that are measured.
        remedy: the option that adds such a file.

    Raises:
        UsageError: an option has no effect.
    """
    unused = _given(options)
    if unused and not options.rounds:
        raise UsageError(
            f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect without a quantised export",
            hint=f"add {remedy}, or drop the option",
        )
    check_verified(options)
    if options.allow_nonfinite and any(kind in quantised for kind in types):
        raise UsageError("--allow-nonfinite has no meaning for quantised weights", hint="drop one of the options")


def check_verified(options: Options) -> None:
    """Refuse options of verification without it.

    Raises:
        UsageError: an option contradicts ``--no-verify``.
    """
    if (unused := _given(options)) and options.verify is None:
        raise UsageError(f"{' and '.join(unused)} contradicts --no-verify", hint="drop one of the options")


def _given(options: Options) -> list[str]:
    """Flags of the options of verification that are given."""
    given = options.given()
    return [INFO[name].flag for name in OF_VERIFICATION if name in given]
