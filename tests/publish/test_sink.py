"""Writing one file: the bytes are the same with direct I/O and through the page cache."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from gptconvert.errors import InputError, OutputError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.export import PlannedFile
from gptconvert.model.tensors import Cast
from gptconvert.publish.file_system import ALIGNMENT, FileSystem
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.writer import write_files
from tests.publish.cases import check, planned, stored
from tests.publishing import FaultyFileSystem, at_most, failing, file_system


class DirectIo(FaultyFileSystem):
    """Record the switching of direct I/O: (enable, whether it is on).

    Reads, writes and copies may fall short.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        super().__init__(at_most(limit))
        self.switched: list[tuple[bool, bool]] = []

    def bypass_cache(self, descriptor: int, enable: bool) -> bool:
        self.switched.append((enable, super().bypass_cache(descriptor, enable)))
        return self.switched[-1][1]


class LateRefusal(DirectIo):
    """Accept direct I/O, then refuse to write except at the start of a file."""

    refused = 0

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and offset:
            self.refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().write_some(descriptor, data, offset)


def small_blocks(file_system: FileSystem, cached_up_to: int = 1 << 30) -> IoSettings:
    """Settings that make every file large enough for direct I/O."""
    return IoSettings(
        file_system, block_bytes=2 * ALIGNMENT, copy_read_bytes=1000, direct_from=1, cached_up_to=cached_up_to
    )


@pytest.fixture
def large(tmp_path: Path) -> PlannedFile:
    a, b = stored(tmp_path / "s", 5000, 3001)
    return planned("f", [b, Cast(a, BFLOAT16), a], b"head", alignment=64, tail=9)


class TestDirectIo:
    @pytest.mark.parametrize("limit", [1 << 30, 5000, 4096])
    def test_same_bytes(self, tmp_path: Path, large: PlannedFile, limit: int) -> None:
        (written,) = write_files(str(tmp_path), [large], cached=False, settings=small_blocks(DirectIo(limit)))
        check(tmp_path, large, written)

    def test_is_switched_on_once(self, tmp_path: Path, large: PlannedFile) -> None:
        direct = DirectIo()
        (written,) = write_files(str(tmp_path), [large], cached=False, settings=small_blocks(direct))
        check(tmp_path, large, written)
        assert direct.switched == [(True, True)]
        assert "copy" not in direct.seen, "the kernel copies through the page cache"

    def test_not_for_files_that_are_read_next(self, tmp_path: Path, large: PlannedFile) -> None:
        direct = DirectIo()
        write_files(str(tmp_path), [large], settings=small_blocks(direct))
        assert direct.switched == []
        assert "copy" in direct.seen

    def test_for_large_files_even_if_they_are_read_next(self, tmp_path: Path, large: PlannedFile) -> None:
        direct = DirectIo()
        io = small_blocks(direct, cached_up_to=large.nbytes - 1)
        (written,) = write_files(str(tmp_path), [large], settings=io)
        check(tmp_path, large, written)
        assert direct.switched == [(True, True)]

    def test_not_for_small_files(self, tmp_path: Path, large: PlannedFile) -> None:
        direct = DirectIo()
        (written,) = write_files(
            str(tmp_path), [large], cached=False, settings=IoSettings(direct, direct_from=large.nbytes + 1)
        )
        check(tmp_path, large, written)
        assert direct.switched == []

    def test_a_file_system_without_it(self, tmp_path: Path, large: PlannedFile) -> None:
        direct = DirectIo()
        direct.bypass_cache = lambda descriptor, enable: False  # type: ignore[method-assign]
        (written,) = write_files(str(tmp_path), [large], cached=False, settings=small_blocks(direct))
        check(tmp_path, large, written)

    def test_a_file_system_that_refuses_late(self, tmp_path: Path, large: PlannedFile) -> None:
        late = LateRefusal()
        (written,) = write_files(str(tmp_path), [large], cached=False, settings=small_blocks(late))
        check(tmp_path, large, written)
        assert (late.refused, late.switched) == (1, [(True, True), (False, False)])

    def test_a_failed_close_is_an_output_error_and_closes_once(self, tmp_path: Path, large: PlannedFile) -> None:
        closed: list[int] = []

        def close(descriptor: int) -> None:
            closed.append(descriptor)
            os.close(descriptor)
            if os.path.exists(tmp_path / "f"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with pytest.raises(OutputError, match=r"f: cannot be written \(Input/output error\)"):
            write_files(str(tmp_path), [large], settings=small_blocks(file_system(close=close)))  # type: ignore[arg-type]
        assert len(closed) == 3  # two readers of the source, and the file

    def test_free_space_that_is_unknown_does_not_hide_the_error(self, tmp_path: Path, large: PlannedFile) -> None:
        full = file_system(allocate=failing(errno.ENOSPC), free_bytes=failing(errno.EIO))
        with pytest.raises(OutputError, match="No space left") as caught:
            write_files(str(tmp_path), [large], settings=IoSettings(full))
        assert caught.value.found == "0 bytes written"

    def test_a_copy_that_cannot_read_its_source_is_an_input_error(self, tmp_path: Path, large: PlannedFile) -> None:
        copying: list[int] = []

        def copy(*_: int) -> int:
            copying.append(1)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def read(descriptor: int, nbytes: int, offset: int) -> bytes:
            if copying:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.pread(descriptor, nbytes, offset)

        with pytest.raises(InputError, match=r"s: cannot be read"):
            write_files(str(tmp_path), [large], settings=IoSettings(file_system(copy=copy, read=read)))

    def test_write_to_a_full_disk_is_not_retried(self, tmp_path: Path, large: PlannedFile) -> None:
        full = DirectIo()
        full.write_some = failing(errno.ENOSPC)  # type: ignore[method-assign]
        with pytest.raises(OutputError, match="No space left"):
            write_files(str(tmp_path), [large], cached=False, settings=small_blocks(full))
        assert full.switched == [(True, True)]


@pytest.mark.parametrize(
    ("code", "hint"), [(errno.EFBIG, "--max-shard-size"), (errno.EDQUOT, "quota"), (errno.ENOSPC, "free some space")]
)
def test_the_hint_fits_the_error(tmp_path: Path, large: PlannedFile, code: int, hint: str) -> None:
    full = FileSystem()
    full.allocate = failing(code)  # type: ignore[method-assign]
    with pytest.raises(OutputError) as caught:
        write_files(str(tmp_path), [large], settings=IoSettings(full))
    assert hint in str(caught.value.hint)
