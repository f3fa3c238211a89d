"""Restricts this process, then runs a module in it: ``python -m gptconvert.targets.child.confine MODULE [BYTES]``.

The limits come before any import: Landlock restricts threads, not processes, and numerical libraries start threads
when imported. With ``BYTES``, writable memory is limited to that size and no file can be written. On Linux 5.13 and
later (Landlock), nothing can be created, removed, renamed or executed; from 6.7 on, no TCP connection can be made.
Reading is not restricted.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import runpy
import sys
import tempfile

#: System calls, equal on all architectures, and Landlock's constants (linux/landlock.h).
CREATE_RULESET, RESTRICT_SELF = 444, 446
VERSION, NO_NEW_PRIVILEGES = 1, 38
#: First version → number of file rights defined then. Rights 2 and 3 (reading files and directories) stay granted.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15}
READING = 1 << 2 | 1 << 3
#: First version that restricts TCP, and its rights: bind and connect.
NETWORK, NETWORK_RIGHTS = 4, 3


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64))


def confine(memory: int) -> None:
    """Limit this process and its future threads.

    Args:
        memory: bytes of writable memory; a file mapped privately counts, untouched pages too.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    if sys.platform == "linux":
        _landlock()


def _landlock() -> None:
    """Deny every access that Landlock knows but reading; do nothing on kernels without it."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION))
    if version < 1:
        return
    rights = (1 << max(count for first, count in FILE_RIGHTS.items() if first <= version)) - 1
    ruleset = _Ruleset(rights & ~READING, NETWORK_RIGHTS if version >= NETWORK else 0)
    size = ctypes.sizeof(ruleset) if version >= NETWORK else 8
    descriptor = libc.syscall(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if descriptor < 0 or libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(RESTRICT_SELF, descriptor, 0):
        raise OSError(ctypes.get_errno(), "Landlock is available, but could not be enabled")


def _prefer_for_killing() -> None:
    """If memory runs out, Linux kills this process first, not the one that waits for it."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def main() -> None:
    """Restrict the process and run the module."""
    module, *memory = sys.argv[1:]
    if memory:
        _prefer_for_killing()
        tempfile.tempdir = tempfile.tempdir or "/tmp"  # TensorFlow looks one up, which would try to write
        confine(int(memory[0]))
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
