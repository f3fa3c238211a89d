"""glibc's heap. Verification allocates and frees blocks of many megabytes, which should return to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: Blocks of at least this many bytes get a mapping of their own.
LARGE = 4 << 20
#: Parameter of mallopt (malloc.h).
_MMAP_THRESHOLD = -3


def trim_heap() -> None:
    """Return freed memory to the system. Small long-lived tensors (errors, outputs) keep glibc's heap from shrinking
    by itself, and every block would leave some of its temporaries behind.
    """
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """Return large blocks when they are freed, in this process and until it ends.

    By default glibc raises its threshold to the largest block freed so far, up to 32 MiB, and later blocks of that
    size fragment its heap: verifying three graphs of GPT-2 124M then held 1.1 GiB where 0.4 were in use.
    """
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)
