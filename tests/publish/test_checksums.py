"""SHA256SUMS, read as ``sha256sum`` writes it."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest

from gptconvert.publish.checksums import dump_sums, parse_sums, sha256_of_file

A, B = "a" * 64, "b" * 64


def test_what_is_written_is_read() -> None:
    digests = {"onnx/model.onnx": A, "a b  c": B, "naïve\u2028.txt": A}
    assert parse_sums(dump_sums(digests)) == (digests, [])


@pytest.mark.parametrize("mode", ["--text", "--binary"])
def test_sums_of_coreutils(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").write_bytes(b"content" * 400_000)
    done = subprocess.run(["sha256sum", mode, "a"], cwd=tmp_path, capture_output=True, check=True)
    expected = {"a": sha256_of_file(io.BytesIO((tmp_path / "a").read_bytes()))}
    assert parse_sums(done.stdout) == (expected, [])
    assert parse_sums(done.stdout.replace(b"\n", b"\r\n")) == (expected, [])


@pytest.mark.parametrize(
    "line", ["nonsense", f"{A} a", f"{A.upper()}  a", f"{A}  ../a", f"{A}  /a", f"{A}  a//b", f"{A}  c:a", f"{B}  x"]
)
def test_lines_that_are_not_checksums_of_files_in_the_directory(line: str) -> None:
    assert parse_sums(f"{A}  x\n{line}\n".encode()) == ({"x": A}, [line])
