"""Options of exports that lose something, in targets that write one file for each type of weights."""

from __future__ import annotations

from collections.abc import Collection

from gptconvert.errors import UsageError
from gptconvert.model.options import INFO, Options

#: Options that only quantised exports use, and only in verification.
OF_QUANTISED = ("eval_text", "max_kl")


def check_used(options: Options, types: Collection[str], quantised: Collection[str], remedy: str) -> None:
    """Refuse options that have no effect on the files.

    Args:
        options: of the conversion.
        types: of the files.
        quantised: those types that are measured.
        remedy: the option that adds such a file.

    Raises:
        UsageError: an option has no effect.
    """
    given = options.given()
    unused = [INFO[name].flag for name in OF_QUANTISED if name in given]
    if unused and not options.rounds:
        raise UsageError(
            f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect without a quantised export",
            hint=f"add {remedy}, or drop the option",
        )
    if unused and options.verify is None:
        raise UsageError(f"{' and '.join(unused)} contradicts --no-verify", hint="drop one of the options")
    if options.allow_nonfinite and any(kind in quantised for kind in types):
        raise UsageError("--allow-nonfinite has no meaning for quantised weights", hint="drop one of the options")
