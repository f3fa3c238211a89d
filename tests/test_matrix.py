"""Convert and verify every source format to every target it supports, in every storage type."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns.correct import close_tensorflow, one_tensorflow
from gptconvert.pipeline import target_named
from gptconvert.targets.registry import TARGETS
from tests.commands import command
from tests.helpers import FIXTURES

#: Fixture → options needed to read it. At least one per format.
SOURCES: dict[str, tuple[str, ...]] = {
    "tiny-gpt2/openai-tf": (),
    "tiny-gpt2/hf-safetensors": (),
    "tiny-gpt2/hf-bin": (),
    "originals/h5-gpt2": (),
    "originals/flax-gpt2": (),
    "originals/flax-gpt-neo": (),
    "originals/gpt1": ("--n-head", "3"),
    "originals/mesh-tf": (),
    "originals/mesh-jax": (),
    "originals/neox-pipeline": (),
    "originals/neox-sequential": (),
    "originals/nanogpt/ckpt.pt": ("--activation", "tanh"),  # OpenAI's format cannot express the erf GELU
    "originals/llmc/gpt2_fp32.bin": (),
    "originals/llmc/gpt2_bf16.bin": (),
    "originals/megatron": (),
    "originals/gguf": (),
}
#: Sources whose SavedModels are written in bfloat16 too.
IN_BFLOAT16 = ("tiny-gpt2/openai-tf", "originals/neox-sequential")
#: Sources that are written as LiteRT files too.
IN_LITERT = ("tiny-gpt2/openai-tf", "originals/mesh-jax")
STORAGE = [
    pytest.param([], marks=pytest.mark.tensorflow),
    ["--dtype", "fp32"],
    ["--dtype", "fp16"],
    pytest.param(["--dtype", "bf16"], marks=pytest.mark.tensorflow),
    ["--no-kv-cache"],
]

pytestmark = pytest.mark.slow


def targets_of(source: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    found = command(capsys, "inspect", FIXTURES / source, *SOURCES[source], "--json").json
    return [name for name in TARGETS if not (families := target_named(name).families) or found["family"] in families]


@pytest.fixture(scope="module")
def shared() -> Iterator[None]:
    """One TensorFlow for all cases, since starting it takes seconds."""
    with one_tensorflow():
        yield
    close_tensorflow()


@pytest.mark.parametrize("storage", STORAGE, ids=" ".join)
@pytest.mark.parametrize("source", SOURCES)
def test_verified(
    source: str, storage: list[str], shared: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With TensorFlow's target, which takes seconds, only as stored, and of two sources in another type."""
    with_tensorflow = not storage or (storage[1:] == ["bf16"] and source in IN_BFLOAT16)
    left_out = {"tf": not with_tensorflow, "tflite": bool(storage) or source not in IN_LITERT}
    targets = [name for name in targets_of(source, capsys) if not left_out.get(name)]
    if "openai-tf" in targets and storage[1:] == ["bf16"] and "gpt1" in source:
        targets.remove("openai-tf")  # npy has no bfloat16
    to = [word for name in targets for word in ("--to", name)]
    arguments = (FIXTURES / source, *SOURCES[source], *storage, *to, "-o", tmp_path / "out", "--json")
    done = command(capsys, "convert", *arguments)
    assert done.code == 0, done.err
    kinds = [artifact["kind"] for artifact in done.json["verification"]["artifacts"] if artifact["ok"]]
    assert sorted(kinds) == sorted(targets)
