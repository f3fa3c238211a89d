"""glibc's heap. Large blocks should return to the system when they are freed, and small ones should not."""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: Blocks of at least this many bytes get a mapping of their own.
LARGE = 4 << 20
#: Free bytes that the heap keeps at its end: temporaries of a few blocks of a tensor.
KEPT = 64 << 20
#: Parameters of mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def trim_heap() -> None:
    """Return freed memory to the system. Small long-lived tensors (errors, outputs) keep glibc's heap from shrinking
    by itself, and every block would leave some of its temporaries behind.
    """
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def set_heap_limits() -> None:
    """Return large blocks when they are freed, and keep the memory of small ones, in this process until it ends.

    By default glibc raises its threshold to the largest block freed so far, up to 32 MiB, and later blocks of that
    size fragment its heap: verifying three graphs of GPT-2 124M then held 1.1 GiB where 0.4 were in use. A fixed
    threshold alone would make it return the end of its heap whenever 128 KiB are free there: the kernel would clear
    each page of each temporary array again, which took half the time of writing a GGUF file.
    """
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_TRIM_THRESHOLD, KEPT)
