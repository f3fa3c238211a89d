"""Everything but verification and ``generate --runtime torch`` works without PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.commands import REPOSITORY, TRAINED

RUN = "import sys; sys.modules['torch'] = None; from gptconvert.__main__ import main; main()"


def without_torch(*args: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", RUN, *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, check=False)


def test_convert_and_generate(tmp_path: Path) -> None:
    targets = ("--to", "onnx,safetensors,openai-tf")
    assert without_torch("inspect", TRAINED).returncode == 0
    converted = without_torch("convert", TRAINED, *targets, "--no-verify", "-o", tmp_path / "out")
    assert (converted.returncode, converted.stderr) == (0, "")
    generated = without_torch("generate", tmp_path / "out", "Objects are", "--max-new-tokens", 3)
    assert generated.stdout.startswith("Objects are")


def test_verification_needs_it_and_says_so_before_writing(tmp_path: Path) -> None:
    converted = without_torch("convert", TRAINED, "-o", tmp_path / "out")
    assert converted.returncode == 4
    assert "verification needs the Python package torch, which is not installed" in converted.stderr
    assert "pip install torch, or convert with --no-verify" in converted.stderr
    assert list(tmp_path.iterdir()) == []
    verified = without_torch("verify", TRAINED, tmp_path)
    assert verified.returncode == 4
    assert "pip install torch\n" in verified.stderr


def test_the_readme_lists_the_packages_for_an_installation_without_torch() -> None:
    import re
    import tomllib

    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = sorted({re.split(r"[<>=]", line)[0] for line in declared} - {"torch"})
    assert f"pip install {' '.join(names)}" in (REPOSITORY / "README.md").read_text()
