"""How files are read and written: through which file system, and in pieces of which size."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptconvert.publish.file_system import OS, FileSystem


@dataclass(frozen=True)
class IoSettings:
    """Sizes decide speed and memory, never the bytes of an artifact.

    Attributes:
        file_system: does the work.
        block_bytes: one block on its way to the disk: large enough for the disk, small enough that Ctrl-C and the
            progress bar stay responsive.
        block_count: blocks in flight: one being filled, two being consumed, the rest even out the threads' speeds.
        copy_read_bytes: read at once while copying: stays in a core's own cache while every consumer uses it.
        read_bytes: read at once otherwise: still fits the cache, and hides the cost of Python.
        direct_from: smallest file written past the page cache if it will not be read next.
        cached_up_to: largest file written through the page cache if it will be read next.
        sha256_up_to: largest input hashed with SHA-256 if nothing is verified; larger ones get a CRC-32C.
    """

    file_system: FileSystem = field(default=OS)
    block_bytes: int = 4 << 20
    block_count: int = 6
    copy_read_bytes: int = 512 << 10
    read_bytes: int = 1 << 20
    direct_from: int = 4 << 20
    cached_up_to: int = 1 << 30
    sha256_up_to: int = 64 << 20


#: The default of every function that takes settings.
DEFAULT_IO = IoSettings()
