"""Which formats claim a path."""

from __future__ import annotations

from typing import Any

from gptconvert.errors import GptConvertError
from gptconvert.model.options import Options
from gptconvert.sources.detect import FORMATS
from gptconvert.sources.format import Format


def claims(form: Format[Any], path: object) -> bool:
    """Whether a format claims a path, even if only to report what is wrong with its files."""
    try:
        located = form.locate(str(path), Options())
    except GptConvertError:
        return True
    return located is not None and form.claims(located)


def claimants(path: object) -> list[str]:
    """Names of all formats that claim a path."""
    return [each.name for each in FORMATS if claims(each, path)]
