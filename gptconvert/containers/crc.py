"""CRC-32C (Castagnoli) as TensorFlow's checkpoints record it.

Polynomial 0x82F63B78 (reflected), initial and final value 0xFFFFFFFF. Files store it *masked* (rotated right by 15
bits, plus a constant), because a CRC over data that contains CRCs is otherwise weak.
"""

from __future__ import annotations

import google_crc32c

_WORD = 0xFFFFFFFF
_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes) -> int:
    """The checksum of ``data``."""
    return int(google_crc32c.value(data))


def mask(checksum: int) -> int:
    """``checksum`` in the masked form that files store."""
    return ((checksum >> 15 | checksum << 17) + _MASK_DELTA) & _WORD


def unmask(masked: int) -> int:
    """The checksum whose masked form is ``masked``."""
    rotated = (masked - _MASK_DELTA) & _WORD
    return (rotated >> 17 | rotated << 15) & _WORD
