"""onnxruntime-genai runs every graph of an export, and writes what our own ``generate`` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gptconvert.generation.model import generate
from gptconvert.generation.sampling import Sampling
from gptconvert.model.options import Options
from gptconvert.pipeline import convert, open_checkpoint
from tests.families.witness import Case
from tests.helpers import FIXTURES
from tests.targets.onnx.test_kinds import index_minus_one
from tests.targets.package import small_exports
from tests.verify.exports import edit

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

NEW = 12
#: Prompts of different lengths: onnxruntime-genai pads the shorter one on the right.
PROMPTS = ("import os", "def test_the_name(self):")
#: Our name of a variant → the suffix of its file.
VARIANTS = {"fp32": "", "q8": "_quantized", "q4": "_q4"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("genai") / "out"
    options = Options(targets=("onnx",), quantize=("q8", "q4"), last_token=True, in_place=True, verify=None)
    convert(open_checkpoint(str(FIXTURES / "gpt2-stdlib")), str(directory), options)
    return directory


def selecting(directory: Path, to: Path, graph: str, share: bool) -> Path:
    """A copy of an export whose genai_config.json names another graph."""
    for path in directory.iterdir():
        (to / path.name).symlink_to(path)
    config = json.loads((directory / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = graph
    config["search"]["past_present_share_buffer"] = share
    (to / "genai_config.json").unlink()
    (to / "genai_config.json").write_text(json.dumps(config))
    return to


def continued(directory: Path, prompts: Sequence[str]) -> list[str]:
    """The prompts as one batch, each with its greedy continuation of at most :data:`NEW` tokens."""
    model = og.Model(str(directory))
    tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
    ids = tokenizer.encode_batch(list(prompts))
    length = ids.shape()[1] if hasattr(ids, "shape") and callable(ids.shape) else ids.shape[1]
    params.set_search_options(max_length=length + NEW, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    decoder = Tokenizer.from_file(str(directory / "tokenizer.json"))
    padding = json.loads((directory / "genai_config.json").read_text())["model"]["pad_token_id"]
    rows = ([int(i) for i in generator.get_sequence(n) if i != padding] for n in range(len(prompts)))
    return [decoder.decode(row) for row in rows]


def expected(directory: Path, prompt: str, variant: str = "fp32") -> str:
    return prompt + generate(str(directory), prompt, Sampling(max_new_tokens=NEW), variant=variant).text


@pytest.mark.parametrize(
    ("kind", "share"),
    [("", False), ("_last_token", False), ("_in_place", False), ("_in_place", True)],
    ids=["growing", "last-token", "in-place", "in-place-shared"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text(variant: str, kind: str, share: bool, exported: Path, tmp_path: Path) -> None:
    """Alone, and in a batch of different lengths."""
    directory = selecting(exported, tmp_path, f"onnx/model{VARIANTS[variant]}{kind}.onnx", share)
    texts = [expected(exported, prompt, variant) for prompt in PROMPTS]
    assert [continued(directory, [prompt])[0] for prompt in PROMPTS] == texts
    assert continued(directory, PROMPTS) == texts


def test_the_index_of_the_last_slot_would_continue_from_padding(exported: Path, tmp_path: Path) -> None:
    """The reason why last-token graphs read the mask."""
    directory = selecting(exported, tmp_path, "onnx/model_wrong.onnx", False)
    (directory / "onnx").unlink()
    (directory / "onnx").mkdir()
    shutil.copy(exported / "onnx/model.onnx_data", directory / "onnx")
    shutil.copy(exported / "onnx/model_last_token.onnx", directory / "onnx/model_wrong.onnx")
    edit(directory / "onnx/model_wrong.onnx", index_minus_one)
    short, long = continued(directory, PROMPTS)
    assert (short != expected(exported, PROMPTS[0]), long) == (True, expected(exported, PROMPTS[1]))


@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "gpt_neox"])
def test_families_in_place(family: str, tmp_path: Path) -> None:
    """genai_config.json names the graph with a shared buffer: windows, unscaled scores and rotary positions."""
    directory = small_exports.export(Case(family), tmp_path, Options(in_place=True))
    assert json.loads((directory / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    prompts = ("Hello", "Hello hello Hello")
    texts = [expected(directory, prompt) for prompt in prompts]
    assert [continued(directory, [prompt])[0] for prompt in prompts] == texts
    # GPT-Neo's windows count slots, as in transformers, so padding between a prompt and its continuation fills them
    assert (continued(directory, prompts) == texts) == (family != "gpt_neo")
