"""PyTorch files for tests: written by torch, rewritten member by member, or built around any pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYOUTS = {"zip": True, "legacy": False}


def save(path: Path, value: Any, layout: str = "zip", protocol: int = 2) -> str:
    import torch

    torch.save(value, path, _use_new_zipfile_serialization=LAYOUTS[layout], pickle_protocol=protocol)
    return str(path)


def rewrite(source: str, target: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> str:
    """Copy ``source`` with ``change`` applied to each member (None drops it) and new checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return str(target)


def zip_of(path: Path, data: bytes, **members: bytes) -> str:
    """The archive that torch.save would write around the pickle ``data``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **members}.items():
            archive.writestr(f"archive/{name}", content)
    return str(path)
