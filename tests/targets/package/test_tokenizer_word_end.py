"""GPT-1's tokenizer files compared with transformers' OpenAIGPTTokenizer, and used in conversion and generation."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptconvert import pipeline
from gptconvert.errors import InputError, UsageError
from gptconvert.generation.model import generate, load
from gptconvert.generation.sampling import Sampling
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.package.tokenizer import end_token_id, tokenizer_files
from tests.commands import command
from tests.helpers import NO_RELEASED_FILES, checkpoint_of
from tests.targets.package.test_tokenizer import CORPUS as GENERAL
from tests.targets.package.test_tokenizer import PUBLISHED, write_all
from tests.targets.package.word_end import HUGGING_FACE, OPENAI, REAL, SIZE, UNKNOWN, symbols, write_pair

CORPUS = [
    *GENERAL,
    "The OTHER thing isn't n't in there...",
    "I don't; you can't, won't 'n' shan't! #### ### ##",
    "Éste niño: café CAFÉ cafe\u0301 naïve NAÏVE Ångström résumés",
    "İstanbul ǅungla ẞtraße ﬃ Σίσυφος ΌΣΟΣ",
    "日本the日and 日",
    f"a {UNKNOWN} b{UNKNOWN}c <UNK> < unk > {UNKNOWN}{UNKNOWN} x</w> </w>",
    "soft\xadhyphen zero\u200bwidth \ufffd \ufeff\u2060 \u0000\u0007 em\u2014dash",
    "aaaa aaaaa aaaaaaa " + "aing" * 30,
    "first line.\n\nsecond line.\n",
    "$3.50 + 10% = x^2 | y_1 ~ `z` @me \\n C:\\dir",
    "。、「」！？…·«»¿¡‽",
]


def gpt1(tokenizer: dict[str, str], n_vocab: int = SIZE, directory: Path | None = None) -> Checkpoint:
    """A GPT-1 in OpenAI's release format (arrays without a configuration), with these tokenizer files; D 24, H 3."""
    width, context = 24, 40
    random = np.random.default_rng(0)
    arrays = {"positions_embed": (context, width), "tokens_embed": (n_vocab, width)}
    for i in range(2):
        for name, (rows, columns) in {
            "attn/c_attn": (width, 3 * width),
            "attn/c_proj": (width, width),
            "mlp/c_fc": (width, 4 * width),
            "mlp/c_proj": (4 * width, width),
        }.items():
            arrays |= {f"h{i}/{name}/w": (1, rows, columns), f"h{i}/{name}/b": (columns,)}  # type: ignore[dict-item]
        arrays |= {f"h{i}/{norm}/{part}": (width,) for norm in ("ln_1", "ln_2") for part in "gb"}  # type: ignore[misc]
    weights = {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in arrays.items()}
    weights |= {name: array + 1 for name, array in weights.items() if name.endswith("/g")}
    request = Options(n_head=3)
    return checkpoint_of({}, weights, directory, scheme="openai-gpt1", request=request, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["real", "odd"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The two files: OpenAI's, and a small pair of the same form."""
    if request.param == "odd":
        return write_pair(tmp_path_factory.mktemp("odd"))
    if not REAL.exists():
        pytest.skip(NO_RELEASED_FILES)
    return {name: str(REAL / name) for name in OPENAI}


@pytest.fixture(scope="module")
def n_vocab(released: dict[str, str]) -> int:
    return len(json.loads(Path(released[OPENAI[0]]).read_bytes()))


@pytest.fixture(scope="module")
def published(released: dict[str, str], n_vocab: int) -> dict[str, bytes]:
    files, notes = tokenizer_files(gpt1(released, n_vocab))
    assert notes == ()
    return files


@pytest.fixture(scope="module")
def converted(published: dict[str, bytes]) -> Any:
    return tokenizers.Tokenizer.from_str(published["tokenizer.json"].decode())


@pytest.fixture(scope="module")
def reference(released: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer from the two released files, under Hugging Face's names."""
    directory = tmp_path_factory.mktemp("reference")
    for released_name, name in zip(OPENAI, HUGGING_FACE, strict=True):
        (directory / name).write_bytes(Path(released[released_name]).read_bytes())
    return transformers.OpenAIGPTTokenizerFast.from_pretrained(directory)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    return text


@pytest.mark.parametrize("text", CORPUS)
def test_ids_and_text_equal_those_of_transformers(text: str, converted: Any, reference: Any) -> None:
    encoding, ids = converted.encode(text), reference(text)["input_ids"]
    assert encoding.ids == ids
    assert encoding.offsets == reference(text, return_offsets_mapping=True)["offset_mapping"]
    assert decoded(converted, ids) == decoded(reference, ids)


ASSIGNED = st.characters(exclude_categories=("Cs", "Cn", "Co")).filter(lambda c: unicodedata.category(c) != "Cn")


@given(st.text(ASSIGNED | st.sampled_from(" \t\n'streingaé#.<unk>\u0301İ日"), max_size=60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_equal_on_random_text(converted: Any, reference: Any, text: str) -> None:
    assert converted.encode(text).ids == reference(text)["input_ids"]


def test_file_equals_the_one_transformers_saves(published: dict[str, bytes], reference: Any) -> None:
    """Except for a post-processor without effect, which transformers adds."""
    mine, other = (json.loads(t) for t in (published["tokenizer.json"], reference.backend_tokenizer.to_str()))
    changes_nothing = [{"Sequence": {"id": "A", "type_id": 0}}]
    assert other.pop("post_processor")["single"] == changes_nothing
    assert mine.pop("post_processor") is None
    mine["model"]["merges"] = [merge.split(" ") for merge in mine["model"]["merges"]]
    for document in (mine, other):  # None and "" both mean that later parts of a word have no prefix
        document["model"]["continuing_subword_prefix"] = document["model"]["continuing_subword_prefix"] or None
    assert mine == other


def test_released_files_are_copied_byte_for_byte(released: dict[str, str], published: dict[str, bytes]) -> None:
    assert set(published) == PUBLISHED
    for released_name, name in zip(OPENAI, HUGGING_FACE, strict=True):
        assert published[name] == Path(released[released_name]).read_bytes()


@pytest.mark.parametrize("only_json", [False, True])
def test_transformers_loads_the_directory(
    only_json: bool, published: dict[str, bytes], reference: Any, tmp_path: Path
) -> None:
    files = {n: d for n, d in published.items() if not only_json or n.startswith("tokenizer")}
    loaded = transformers.AutoTokenizer.from_pretrained(
        write_all(tmp_path, {**files, "config.json": b'{"model_type": "openai-gpt"}'})
    )
    assert type(loaded) is type(reference)
    assert len(loaded) == len(reference)
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.pad_token) == (None, None, UNKNOWN, None)
    assert loaded.model_max_length == 40
    for text in CORPUS:
        ids = loaded(text)["input_ids"]
        assert ids == reference(text)["input_ids"]
        assert loaded.decode(ids) == decoded(reference, ids)


def test_the_three_forms_of_one_tokenizer_give_the_same_files(published: dict[str, bytes], tmp_path: Path) -> None:
    """OpenAI's two files, Hugging Face's two, and a lone tokenizer.json, from which the two are derived."""
    directory = write_all(tmp_path / "hf", {name: published[name] for name in HUGGING_FACE})
    pair = {name: str(directory / name) for name in HUGGING_FACE}
    assert tokenizer_files(gpt1(pair, 10**5))[0] == published
    (tmp_path / "tokenizer.json").write_bytes(published["tokenizer.json"])
    lone = {"tokenizer.json": str(tmp_path / "tokenizer.json")}
    derived, notes = tokenizer_files(gpt1(lone, 10**5))
    assert [note.startswith("the vocabulary is padded") for note in notes] == [True]
    assert {n: d for n, d in derived.items() if n != "vocab.json"} == {
        n: d for n, d in published.items() if n != "vocab.json"
    }
    assert json.loads(derived["vocab.json"]) == json.loads(published["vocab.json"])
    assert tokenizer_files(gpt1({**lone, **pair}, 10**5))[0] == published


def test_old_tokenizer_json_from_the_hub(published: dict[str, bytes], reference: Any, tmp_path: Path) -> None:
    """Merges as strings, empty affixes and options that later versions added missing: the same class still."""
    raw = json.loads(published["tokenizer.json"])
    raw["model"]["continuing_subword_prefix"] = ""
    for late in ("byte_fallback", "ignore_merges"):
        del raw["model"][late]
    files, _ = tokenizer_files(
        gpt1({"tokenizer.json": str(write_all(tmp_path, {"t": json.dumps(raw).encode()}) / "t")})
    )
    assert files["merges.txt"] == published["merges.txt"]
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == type(reference).__name__


def test_without_an_end_token(published: dict[str, bytes], released: dict[str, str], n_vocab: int) -> None:
    """As expected of GPT-1, and so not noted."""
    assert end_token_id(gpt1(released, n_vocab), published) is None


@pytest.mark.parametrize("name", OPENAI)
def test_a_missing_or_corrupt_file(name: str, tmp_path: Path) -> None:
    found = write_pair(tmp_path)
    Path(found[name]).write_bytes(b"\xff")
    with pytest.raises(InputError) as caught:
        tokenizer_files(gpt1(found))
    assert caught.value.path == found.pop(name)
    files, notes = tokenizer_files(gpt1(found))
    assert files == {}
    assert [name in note for note in notes] == [True]


def test_tokens_added_in_fine_tuning(tmp_path: Path) -> None:
    """As appended by OpenAI's fine-tuning code, and as stored by Hugging Face."""
    added = {"_start_": SIZE, "_Delimiter_": SIZE + 1, "_classify_": SIZE + 2}
    source = tmp_path / "hf"
    found = write_pair(source, HUGGING_FACE)
    small = {"added_tokens.json": added, "tokenizer_config.json": {"cls_token": "_classify_", "pad_token": UNKNOWN}}
    for name, content in small.items():
        (source / name).write_text(json.dumps(content))
        found[name] = str(source / name)
    files, notes = tokenizer_files(gpt1(found, SIZE + 3))
    assert notes == ()
    loaded = transformers.AutoTokenizer.from_pretrained(write_all(tmp_path / "out", files))
    witness = transformers.OpenAIGPTTokenizerFast.from_pretrained(source)
    text = "_start_the other_Delimiter_thing _classify_ _delimiter_ <unk>"
    ids = loaded(text)["input_ids"]
    assert ids == witness(text)["input_ids"]
    assert ids == tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).encode(text).ids
    assert set(added.values()) <= set(ids)
    assert loaded.decode(ids, skip_special_tokens=True) == witness.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stated", ["<oov>", {"__type": "AddedToken", "content": "<oov>", "lstrip": False}])
def test_another_unknown_token(stated: object, tmp_path: Path) -> None:
    vocabulary = {"<oov>" if symbol == UNKNOWN else symbol: number for symbol, number in symbols().items()}
    found = write_pair(tmp_path / "hf", HUGGING_FACE, vocabulary)
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"unk_token": stated}))
    found["tokenizer_config.json"] = str(tmp_path / "hf" / "tokenizer_config.json")
    files, notes = tokenizer_files(gpt1(found))
    assert notes == ()
    loaded = transformers.AutoTokenizer.from_pretrained(write_all(tmp_path / "out", files))
    assert type(loaded).__name__ == "OpenAIGPTTokenizer"
    witness = transformers.OpenAIGPTTokenizerFast.from_pretrained(tmp_path / "hf")
    for text in ("the € ring", "<oov> in <unk>"):
        assert loaded(text)["input_ids"] == witness(text)["input_ids"]
    assert vocabulary["<oov>"] in loaded("the € ring")["input_ids"]


def test_vocabulary_without_an_unknown_token(tmp_path: Path) -> None:
    """transformers would use an id beyond the model's embedding; here the text is lost, with a note."""
    vocabulary = {symbol: number for number, symbol in enumerate(s for s in symbols() if s != UNKNOWN)}
    files, notes = tokenizer_files(gpt1(write_pair(tmp_path, OPENAI, vocabulary), len(vocabulary)))
    assert [note.startswith("1 symbols of the alphabet") for note in notes] == [True]
    config = b'{"model_type": "openai-gpt"}'
    loaded = transformers.AutoTokenizer.from_pretrained(write_all(tmp_path / "out", {**files, "config.json": config}))
    ids = loaded("the € ring")["input_ids"]
    assert max(ids) < len(vocabulary) == len(loaded)
    assert loaded.decode(ids) == "the ring"


# Further on: conversion, and text made with the result.


@pytest.mark.parametrize("has_files", [True, False])
def test_conversion_with_and_without_tokenizer_files(has_files: bool, tmp_path: Path) -> None:
    tokenizer = write_pair(tmp_path / "source") if has_files else {}
    (tmp_path / "weights").mkdir()
    checkpoint = gpt1(tokenizer, 101, tmp_path / "weights")
    options = pipeline.Options(targets=("onnx", "safetensors"))
    result = pipeline.convert(checkpoint, str(tmp_path / "out"), options)
    assert result.report is not None
    assert result.report.passed
    assert PUBLISHED & {file.path for file in result.files} == (PUBLISHED if has_files else set())
    expected = "the vocabulary is padded" if has_files else "the checkpoint has no tokenizer files"
    assert sum(note.startswith(expected) for note in result.notes) == 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (None, 101)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted GPT-1 in which every id is a token, so that any id can be generated."""
    directory = tmp_path_factory.mktemp("gpt1")
    checkpoint = gpt1(write_pair(directory), SIZE, directory)
    pipeline.convert(checkpoint, str(directory / "out"), pipeline.Options(verify=None))
    return directory / "out"


@pytest.mark.parametrize("prompt", ["The other thing", "the € in", f"in {UNKNOWN}", "#"])
@pytest.mark.parametrize("seed", range(3))
def test_generated_pieces_are_the_text(prompt: str, seed: int, exported: Path) -> None:
    """The pieces continue the prompt as the tokenizer decodes it, with spaces between words."""
    tokenizer = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    with load(str(exported)) as model:
        running = model.stream(prompt, Sampling(24, temperature=1.5, seed=seed))
        pieces = list(running.pieces)
    before = decoded(tokenizer, list(running.prompt))
    whole = decoded(tokenizer, [*running.prompt, *running.ids])
    assert len(running.ids) == 24
    assert before + "".join(pieces) == whole
    assert "</w>" not in whole
    assert tokenizer.encode(prompt).ids == list(running.prompt)
    if prompt == "The other thing":
        assert pieces[0].startswith(" ")
        assert sum(map(bool, pieces)) > 12, "text came in one lump, not as it was made"


def test_generate_on_the_command_line(exported: Path, capsys: Any) -> None:
    done = command(capsys, "generate", exported, "The other", "--max-new-tokens", 5, "--json")
    assert done.code == 0
    streamed = command(capsys, "generate", exported, "The other", "--max-new-tokens", 5)
    assert streamed.out == f"The other{done.json['text']}\n"
    assert len(done.json["ids"]) == 5


def test_prompt_of_white_space_only(exported: Path) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        generate(str(exported), " \n ", Sampling(1))


@pytest.mark.skipif(not REAL.exists(), reason=NO_RELEASED_FILES)
def test_openais_own_directory(tmp_path: Path) -> None:
    checkpoint = pipeline.open_checkpoint(str(REAL), Options(n_head=4))
    pipeline.convert(checkpoint, str(tmp_path / "out"), pipeline.Options(verify=None))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("the president is")["input_ids"] == [481, 4735, 544]  # from transformers' own test
    found = generate(str(tmp_path / "out"), "the president is", Sampling(5))
    assert "the president is" + found.text == loaded.decode([*found.prompt_ids, *found.continuations[0].ids])
