"""A loaded export: prompts one after another, several rows, stop texts, and pieces of whole characters."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptconvert
from gptconvert import Options, Sampling
from gptconvert.errors import InputError, UsageError
from gptconvert.generation.model import Model
from gptconvert.generation.stop import Stop
from gptconvert.pipeline import convert
from tests.commands import command
from tests.helpers import FIXTURES

PROMPT, TEXT = "Objects are", " never explicitly destroyed; however, when they become unreachable they may be"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("model") / "out"
    options = Options(targets=("onnx", "safetensors"), in_place=True, verify=None)
    convert(FIXTURES / "gpt2-stdlib", output, options)
    return str(output)


@pytest.fixture(scope="module", params=["in place", "fp32", "torch"])
def model(request: Any, directory: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """With each way to keep the cache of several rows."""
    if request.param == "fp32":
        copy = tmp_path_factory.mktemp("copy") / "out"
        convert(FIXTURES / "gpt2-stdlib", copy, Options(verify=None))
        directory = str(copy)
    with gptconvert.load(directory, "torch" if request.param == "torch" else "onnx") as loaded:
        yield loaded


def test_one_prompt_after_another(model: Model) -> None:
    sampling = Sampling(30)
    first = model.generate(PROMPT, sampling)
    assert model.generate("A class", sampling).text != first.text
    assert model.generate(PROMPT, sampling).continuations == first.continuations
    assert (first.prompt, first.text[: len(TEXT)]) == (PROMPT, TEXT)
    assert first.continuations[0].stopped == "max_new_tokens"
    assert str(first) == PROMPT + first.text


def test_beams_follow_their_own_cache(model: Model) -> None:
    """Each score is what the model gives the text anew."""
    found = model.generate("The value", Sampling(9, num_beams=4, num_return_sequences=4)).continuations
    assert len({each.ids for each in found}) == 4
    ids = model.encode("The value")
    for each in found:
        total = 0.0
        for place, token in enumerate(each.ids):
            logits = model.logits([*ids, *each.ids[:place]]).astype(np.float64)
            total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert each.score == pytest.approx(total / len(each.ids), abs=1e-4)


def test_rows_that_end_leave_the_batch(model: Model) -> None:
    """Each row is what its seed gives, however many end before."""
    sampling = Sampling(25, temperature=1.2, seed=4, num_return_sequences=4, stop=("e",))
    found = model.generate("The value", sampling).continuations
    assert len({len(each.ids) for each in found}) > 1
    assert all(each.stopped == "stop" and "e" not in each.text for each in found)
    alone = model.generate("The value", Sampling(25, temperature=1.2, seed=4, stop=("e",))).continuations
    assert alone == found[:1]


def test_beams_end_with_a_stop_text(model: Model) -> None:
    found = model.generate(PROMPT, Sampling(30, num_beams=3, num_return_sequences=3, stop=("destroyed",)))
    assert found.continuations[0].text == " never explicitly "
    assert found.continuations[0].stopped == "stop"


def test_streaming_is_the_same_text(model: Model) -> None:
    for sampling in (Sampling(30), Sampling(30, stop=("destroyed; h",)), Sampling(20, seed=2)):
        running = model.stream(PROMPT, sampling)
        pieces = list(running.pieces)
        found = model.generate(PROMPT, sampling)
        assert "".join(pieces) == found.text
        assert (running.stopped, tuple(running.ids)) == (found.continuations[0].stopped, found.continuations[0].ids)
        assert len(pieces) > 2
    with pytest.raises(UsageError, match="single continuation"):
        model.stream(PROMPT, Sampling(num_beams=2))


def test_logits_and_token_ids(model: Model) -> None:
    ids = model.encode(PROMPT)
    assert model.decode(ids) == PROMPT
    logits = model.logits(PROMPT)
    assert logits.shape == (model.vocab_size,)
    assert np.array_equal(logits, model.logits(ids))
    found = model.generate(ids, Sampling(1))
    assert found.continuations[0].ids == (int(logits.argmax()),)
    assert found.prompt == PROMPT
    with pytest.raises(UsageError, match="not a token id"):
        model.logits([-1])
    with pytest.raises(UsageError, match="fills the context"):
        model.logits([1] * model.n_ctx)
    assert f"{model.vocab_size} ids" in repr(model)


class Scripted:
    """A runtime that writes given ids."""

    n_ctx, vocab_size = 128, None

    def __init__(self, ids: list[int], size: int) -> None:
        self.ids, self.size, self.done = ids, size, 0

    def step(self, rows: Any, parents: Any) -> Any:
        logits = np.zeros((len(rows), self.size), np.float32)
        logits[:, self.ids[self.done]] = 1
        self.done += 1
        return logits

    def reset(self, most: int | None = None) -> None:
        self.done = 0


@pytest.mark.parametrize("text", ["😀👩‍👩‍👧 done", "日本語のテキスト", "e\u0301a\u0308 क्षि", "a\ufffdb", "🇩🇪"])
def test_pieces_are_whole_characters(text: str, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte-level tokens cut inside characters; pieces do not."""
    with gptconvert.load(directory) as model:
        ids = model.encode(text)
        monkeypatch.setattr(model, "_runtime", Scripted(ids, model.vocab_size))
        pieces = list(model.stream("x", Sampling(len(ids))).pieces)
    assert "".join(pieces) == text
    assert text == "a\ufffdb" or not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 1 or len(ids) == 1 or len(text) == 2


def test_an_unfinished_character_at_the_end(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with gptconvert.load(directory) as model:
        ids = model.encode("a😀")[:-1]
        monkeypatch.setattr(model, "_runtime", Scripted(ids, model.vocab_size))
        assert "".join(model.stream("x", Sampling(len(ids))).pieces).rstrip("\ufffd") == "a"


@pytest.mark.parametrize(
    ("text", "found", "sure"),
    [
        ("abc", ("abc", False), 3),
        ("abcST", ("abcST", False), 3),
        ("abSTOPc", ("ab", True), 7),
        ("abSTO", ("abSTO", False), 2),
    ],
)
def test_stop_texts(text: str, found: tuple[str, bool], sure: int) -> None:
    stop = Stop(("STOP", "STATE"), lambda ids: "")
    assert (stop.cut(text), stop.certain(text)) == (found, sure)


def test_tokens_that_the_model_lacks(directory: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(directory, tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 9999, "content": "<|extra|>"})
    path.write_text(json.dumps(tokenizer))
    with (
        gptconvert.load(str(tmp_path / "out")) as model,
        pytest.raises(InputError, match="an id that the model does not have") as caught,
    ):
        model.generate("<|extra|>", Sampling(1))
    assert caught.value.path == str(path)


# --- Command line ---------------------------------------------------------------------------------------------------


def test_prompts_of_a_file(directory: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Objects are"}\n\n{"text": 1}\nno json\n{"prompt": "A class"}\n')
    done = command(capsys, "generate", directory, "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 3)
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [(line["line"], line["ok"]) for line in lines] == [(1, True), (3, False), (4, False), (5, True)]
    assert lines[0]["text"] == TEXT[: len(lines[0]["text"])]
    assert lines[1]["error"]["tensor"] == "line 3"
    assert done.code == 3
    (tmp_path / "p.txt").write_bytes(b"Objects are\r\nA class\n")
    done = command(capsys, "generate", directory, "--prompts", tmp_path / "p.txt", "--max-new-tokens", 3)
    assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["Objects are", "A class"]
    assert done.code == 0
    assert command(capsys, "generate", directory, "--prompts", tmp_path / "none").code == 3


def test_prompt_from_a_pipe(directory: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    expected = command(capsys, "generate", directory, PROMPT, "--max-new-tokens", 3).out
    for words in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Objects are\n")))
        assert command(capsys, "generate", directory, *words, "--max-new-tokens", 3).out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    done = command(capsys, "generate", directory, "-")
    assert (done.code, "not UTF-8" in done.err) == (2, True)


def test_interactive(directory: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """An error ends its text only."""
    prompts = f"Objects are\n{'word ' * 300}\nA class\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompts)))
    done = command(capsys, "generate", directory, "--interactive", "--max-new-tokens", 3)
    assert done.code == 0
    assert done.out.splitlines()[0].startswith("Objects are never")
    assert any(line.startswith("A class") for line in done.out.splitlines())
    assert "error: the prompt fills the context" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--interactive"], "PROMPT contradicts --interactive"),
        (["x", "--prompts", "f"], "PROMPT contradicts --prompts"),
        (["--interactive", "--json"], "--json contradicts --interactive"),
        (["x", "--num-beams", "2", "--top-p", "0.5"], "--num-beams contradicts --top-p"),
        (["x", "--num-return-sequences", "2"], "one most likely continuation"),
    ],
)
def test_contradictions(words: list[str], message: str, directory: str, capsys: Any) -> None:
    done = command(capsys, "generate", directory, *words)
    assert done.code == 2
    assert message in done.err


def test_several_texts(directory: str, capsys: Any) -> None:
    words = ["generate", directory, PROMPT, "--num-beams", 3, "--num-return-sequences", 2, "--max-new-tokens", 4]
    done = command(capsys, *words)
    assert done.out.startswith("== 1 of 2, score -0.")
    found = command(capsys, *words, "--json").json
    assert [f"{PROMPT}{each['text']}" in done.out for each in found["continuations"]] == [True, True]
    assert found["text"] == found["continuations"][0]["text"]
