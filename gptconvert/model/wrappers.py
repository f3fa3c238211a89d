"""Remove the components that PyTorch's wrappers insert in the middle of tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gptconvert.errors import InputError

#: FSDP, activation checkpointing, and torch.compile of single layers.
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_COMPONENT = re.compile(rf"(?:(?<=\.)|^)({'|'.join(WRAPPERS)})\.")
#: Modules in front of which or around which a wrapper is part of a prefix, which is found by rule.
_OUTER = frozenset(("module", "model", *WRAPPERS))


def unwrapped(names: Iterable[str], path: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The name without wrappers → the name in the file, if any layer is wrapped; and a note. Otherwise empty.

    Raises:
        InputError: two names differ in their wrappers only.
    """
    names = list(names)
    if not any(map(_is_inside, names)):
        return {}, ()
    removed = dict.fromkeys(match[1] for name in names for match in _COMPONENT.finditer(name))
    found: dict[str, str] = {}
    for name in names:
        plain = _COMPONENT.sub("", name)
        if plain in found:
            raise InputError(f"two tensors are named {plain} without their wrappers", path=path, item=name)
        found[plain] = name
    listed = ", ".join(f"'{wrapper}.'" for wrapper in removed)
    return found, (f"removed the names of wrappers from the tensor names: {listed}",)


def _is_inside(name: str) -> bool:
    """Whether a wrapper follows a module of the model itself, such as a layer."""
    start = max((match.start() for match in _COMPONENT.finditer(name)), default=0)
    return not _OUTER.issuperset(name[:start].split(".")[:-1])
