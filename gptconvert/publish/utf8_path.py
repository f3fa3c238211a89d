"""Paths for libraries that accept only UTF-8: onnxruntime and TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from gptconvert.publish.scratch import Scratch


@contextmanager
def utf8_path(path: str) -> Iterator[str]:
    """``path``, or, if it is not valid UTF-8, a path through a temporary link to its directory."""
    try:
        path.encode()
    except UnicodeEncodeError:
        folder, name = os.path.split(os.path.abspath(path))
        with Scratch() as directory:
            link = os.path.join(directory, "artifact")
            os.symlink(folder, link)
            yield os.path.join(link, name)
    else:
        yield path
