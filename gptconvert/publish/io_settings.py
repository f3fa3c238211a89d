"""Settings for reading and writing files: the file system, and block sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptconvert.publish.file_system import OS, FileSystem


@dataclass(frozen=True)
class IoSettings:
    """Sizes affect speed and memory, never the bytes of an artifact.

    Attributes:
        file_system: the file operations.
        block_bytes: size of a write: large enough for the disk, small enough for responsive Ctrl-C and progress.
        block_count: blocks in flight: one being filled, two being consumed, the others a buffer between the threads.
        copy_read_bytes: size of a read when copying: stays in a core's own cache while every consumer uses it.
        read_bytes: size of other reads: fits the cache, and amortises Python's overhead.
        direct_from: smallest file written with direct I/O if it will not be read next.
        cached_up_to: largest file written through the page cache if it will be read next.
        sha256_up_to: largest input hashed with SHA-256 without verification; larger ones get a CRC-32C.
    """

    file_system: FileSystem = field(default=OS)
    block_bytes: int = 4 << 20
    block_count: int = 6
    copy_read_bytes: int = 512 << 10
    read_bytes: int = 1 << 20
    direct_from: int = 4 << 20
    cached_up_to: int = 1 << 30
    sha256_up_to: int = 64 << 20


#: The default settings.
DEFAULT_IO = IoSettings()
