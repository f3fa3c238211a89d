"""The one form in which this program writes JSON files."""

from __future__ import annotations

import json


def dump_json(value: object) -> bytes:
    """``value`` as transformers writes its JSON files: sorted keys, two spaces, ASCII, a newline at the end.

    Raises:
        ValueError: ``value`` holds NaN or an infinity, which JSON has not.
    """
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
