"""``generate`` and ``verify`` on damaged and hostile directories: an exit code, a message, no hang."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from campaigns.exports import FOREIGN, UNFORESEEN, make_export
from gptconvert.errors import InputError
from gptconvert.generation.sampling import Sampling, settle
from gptconvert.generation.search import beam_search, decode
from tests.commands import Outcome, command

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_export(tmp_path_factory.mktemp("made"))


@pytest.fixture
def export(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "export"))


def edited(name: str, **values: object) -> Change:
    """Set keys of a JSON object."""

    def change(folder: Path) -> None:
        path = folder / name
        raw = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**raw, **values}))

    return change


def content(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def special(name: str, make: Callable[[Path], object]) -> Change:
    """Another kind of file in the place of one."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def outside(path: Path) -> None:
    shutil.copy(path.parent / "vocab.json", path.parent.parent / "other.json")
    path.symlink_to(path.parent.parent / "other.json")


def assert_refused(done: Outcome, code: int, *texts: str) -> None:
    assert done.code == code, done.err
    assert not FOREIGN.search(done.err), done.err
    assert UNFORESEEN not in done.err
    for text in texts:
        assert text in done.err


DOCUMENTS = ("config.json", "generation_config.json", "tokenizer.json")
SPECIAL: Mapping[str, tuple[Callable[[Path], object], int]] = {
    "a directory": (Path.mkdir, 7),
    "a named pipe": (os.mkfifo, 7),
    "a socket": (bind, 7),
    "/dev/zero": (lambda path: path.symlink_to("/dev/zero"), 7),
    "a link out": (outside, 7),
    "a link to itself": (lambda path: path.symlink_to(path.name), 3),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), 3),
    "a terabyte": (sparse, 3),
    "empty": (Path.touch, 3),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_other_files_in_the_place_of_documents(name: str, kind: str, export: Path, capsys: Any) -> None:
    make, code = SPECIAL[kind]
    special(name, make)(export)
    assert_refused(command(capsys, "generate", export, "the he", "--runtime", "torch"), code, str(export / name))


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "a link out"])
@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx"])
def test_other_files_in_the_place_of_graphs(name: str, kind: str, export: Path, capsys: Any) -> None:
    if name == "onnx":
        shutil.move(export / "onnx", export / "moved")
        (export / "onnx").touch()
    special(name, SPECIAL[kind][0])(export)
    done = command(capsys, "generate", export, "the he")
    assert_refused(done, done.code if done.code in (3, 7) else 3, str(export))


#: Damage to documents → exit code and parts of the message.
BROKEN: Mapping[str, tuple[Change, int, tuple[str, ...]]] = {
    **{
        f"{name} of {what}": (content(name, data), 3, (name,))
        for name in DOCUMENTS
        for what, data in {
            "deep JSON": b"[" * 100_000,
            "deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
            "no JSON": b"nothing",
            "a list": b"[]",
            "Latin-1": b'{"a": "\xe9"}',
            "half": b'{"vocab_size": 97, "n_posi',
        }.items()
    },
    "no config.json": (lambda folder: (folder / "config.json").unlink(), 3, ("no config.json",)),
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), 3, ("no tokenizer.json",)),
    **{
        f"n_positions {value}": (
            edited("config.json", n_positions=value, n_ctx=None),
            3,
            ("config.json", "n_positions"),
        )
        for value in (0, -1, True, "40", 10**12, 10**30, [40], 1.5)
    },
    **{
        f"vocab_size {value}": (edited("config.json", vocab_size=value), 3, ("config.json", "vocab_size"))
        for value in (0, -97, "97", 10**12, [97])
    },
    **{
        f"{key} {value}": (edited("generation_config.json", **{key: value}), 3, ("generation_config.json", key))
        for key in ("eos_token_id", "bos_token_id", "pad_token_id")
        for value in (1.5, "96", 10**30, [[96]], ["a"], {}, True)
    },
    "a small vocabulary": (edited("config.json", vocab_size=5), 3, ("do not match the configuration",)),
    "a small context": (edited("config.json", n_positions=2, n_ctx=2), 3, ("do not match the configuration",)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_documents(what: str, export: Path, capsys: Any) -> None:
    change, code, texts = BROKEN[what]
    change(export)
    assert_refused(command(capsys, "generate", export, "the he", "--runtime", "torch"), code, *texts)


def test_ids_outside_the_vocabulary_are_noted_and_unused(export: Path, capsys: Any) -> None:
    edited("generation_config.json", eos_token_id=[-1, 50256], bos_token_id=50256, pad_token_id=-1)(export)
    words = ["--runtime", "torch", "--max-new-tokens", "2"]
    done = command(capsys, "generate", export, "the he", *words)
    assert done.code == 0
    assert "note: the text does not end at eos_token_id -1, 50256: the model has 97 ids" in done.err
    assert_refused(command(capsys, "generate", export, "", *words), 2, "no token to start with")


def test_a_prompt_with_nul(export: Path, capsys: Any) -> None:
    done = command(capsys, "generate", export, "t\0he", "--runtime", "torch", "--max-new-tokens", "1")
    assert done.code == 0
    assert done.out.startswith("t\0he")


def charsmap(size: int) -> object:
    table = size.to_bytes(4, "little") + b"\xff" * 64
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def padding(size: object, multiple: object = None) -> object:
    ids = {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    return {"strategy": size, "direction": "Right", "pad_to_multiple_of": multiple, **ids}


TOKENIZERS: Mapping[str, tuple[str, object, int, str]] = {
    "an aborting charsmap": ("normalizer", charsmap(2**32 - 1), 7, "killed by signal 6"),
    "a broken charsmap": ("normalizer", charsmap(4), 3, "cannot be read by the tokenizers library"),
    "padding without bound": ("padding", padding({"Fixed": 10**12}), 7, "killed by signal 6"),
    "an endless pattern": (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "((a|e|h)+)+$"}, "behavior": "Isolated", "invert": False},
        3,
        "cannot encode text",
    ),
    "a stride beyond the length": (
        "truncation",
        {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
        3,
        "cannot encode text",
    ),
    "an unknown part": ("decoder", {"type": "NoSuch"}, 3, "cannot be read by the tokenizers library"),
    "an enormous text": (
        "decoder",
        {"type": "Replace", "pattern": {"String": "e"}, "content": "a" * 40_000_000},
        3,
        "cannot decode text",
    ),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_hostile_tokenizers(what: str, export: Path, capsys: Any) -> None:
    part, value, code, text = TOKENIZERS[what]
    edited("tokenizer.json", **{part: value})(export)
    prompt = "heaha" * 6 + "ttttb" if "pattern" in what else "hehe"
    done = command(capsys, "generate", export, prompt, "--runtime", "torch", "--max-new-tokens", "1")
    assert_refused(done, code, str(export / "tokenizer.json"), text)


def test_converting_a_checkpoint_whose_tokenizer_aborts(made: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    source = Path(shutil.copytree(made[0], tmp_path / "source"))
    shutil.copy(made[1] / "tokenizer.json", source)
    edited("tokenizer.json", normalizer=charsmap(2**32 - 1))(source)
    done = command(capsys, "convert", source, "--to", "safetensors", "-o", tmp_path / "out", "--no-verify")
    assert_refused(done, 7, "tokenizer.json", "killed by signal 6")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_verify_reports_a_tokenizer_that_aborts(
    made: tuple[Path, Path], export: Path, capsys: Any, monkeypatch: Any
) -> None:
    from gptconvert.targets import verification
    from gptconvert.verify.report import Report

    monkeypatch.setattr(verification, "verify", lambda *_: Report("default", []))
    edited("tokenizer.json", normalizer=charsmap(2**32 - 1))(export)
    edited("genai_config.json", model={"decoder": 5})(export)
    (export / "SHA256SUMS").unlink()
    os.mkfifo(export / "vocab.json.fifo")
    special("vocab.json", os.mkfifo)(export)
    done = command(capsys, "verify", made[0], export)
    assert done.code == 5, done.err
    assert "tokenizer.json: the tokenizer ended the process that ran it" in done.out
    assert "vocab.json: not a regular file" in done.out
    assert "genai_config.json: has no decoder" in done.out


def onnx_change(change: Callable[[Any], object]) -> Change:
    def damage(folder: Path) -> None:
        import onnx

        path = folder / "onnx" / "model.onnx"
        model = onnx.load_model(path, load_external_data=False)
        change(model.graph)
        path.write_bytes(model.SerializeToString())

    return damage


def value(graph: Any, name: str) -> Any:
    return next(each for each in [*graph.input, *graph.output] if each.name == name)


def added(graph: Any, name: str) -> None:
    graph.input.add().CopyFrom(graph.input[0])
    graph.input[-1].name = name


KEY = "past_key_values.0.key"
GRAPHS: Mapping[str, tuple[Callable[[Any], object], int, tuple[str, ...]]] = {
    "a symbolic past": (
        lambda graph: setattr(value(graph, KEY).type.tensor_type.shape.dim[1], "dim_param", "heads"),
        4,
        (f"input {KEY}", "expected a number as size 1"),
    ),
    "a past without a shape": (
        lambda graph: value(graph, KEY).type.tensor_type.ClearField("shape"),
        4,
        (f"input {KEY} has unknown sizes",),
    ),
    "no present": (
        lambda graph: graph.output.remove(value(graph, "present.1.value")),
        4,
        ("present.1.value is missing",),
    ),
    "a further input": (lambda graph: added(graph, "use_cache_branch"), 4, ("input use_cache_branch is unknown",)),
    "logits renamed": (lambda graph: setattr(value(graph, "logits"), "name", "x"), 4, ("output logits is missing",)),
    "ids of floats": (
        lambda graph: setattr(value(graph, "input_ids").type.tensor_type, "elem_type", 1),
        4,
        ("input input_ids has the type float32",),
    ),
    "ids of rank 3": (
        lambda graph: value(graph, "input_ids").type.tensor_type.shape.dim.add(),
        4,
        ("input input_ids has 3 sizes, expected 2",),
    ),
    "another vocabulary": (
        lambda graph: setattr(value(graph, "logits").type.tensor_type.shape.dim[2], "dim_value", 50),
        3,
        ("config.json: vocab_size is not that of the model", "expected 50 ids, found 97"),
    ),
    "a present of ids": (
        lambda graph: setattr(value(graph, "present.0.key").type.tensor_type, "elem_type", 7),
        4,
        ("output present.0.key has the type int64",),
    ),
    "a node without its inputs": (lambda graph: graph.node.pop(3), 3, ("onnxruntime cannot load the graph",)),
    "heads of another number": (
        lambda graph: setattr(value(graph, KEY).type.tensor_type.shape.dim[1], "dim_value", 7),
        3,
        ("onnxruntime cannot",),
    ),
}


@pytest.mark.parametrize("what", GRAPHS)
def test_graphs_that_cannot_generate(what: str, export: Path, capsys: Any) -> None:
    change, code, texts = GRAPHS[what]
    onnx_change(change)(export)
    assert_refused(command(capsys, "generate", export, "the he"), code, *texts)


def test_a_context_longer_than_the_models(export: Path, capsys: Any) -> None:
    edited("config.json", n_positions=2000, n_ctx=2000)(export)
    done = command(capsys, "generate", export, "the he " * 60)
    assert_refused(done, 3, "model.onnx: onnxruntime cannot run the graph", "out of data bounds")


def test_modules_of_the_current_directory_are_not_imported(
    export: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("contextlib", "tokenizers", "onnxruntime", "numpy", "tempfile"):
        (export / f"{name}.py").write_text(f"open({str(export / 'ran')!r}, 'w'); raise SystemExit(9)\n")
    monkeypatch.chdir(export)
    done = command(capsys, "generate", ".", "the he", "--max-new-tokens", "1")
    assert done.code == 0, done.err
    assert not (export / "ran").exists()


class Broken:
    n_ctx = 40

    def __init__(self, logits: object, vocab_size: int | None = 3) -> None:
        self.logits, self.vocab_size = np.array(logits, np.float32), vocab_size

    def step(self, rows: object, parents: object) -> Any:
        return self.logits

    def reset(self, most: int | None = None) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits",
    [[[0, np.nan, 1]], [[np.inf, 0, 1]], [[-np.inf] * 3], [0, 1, 2], [[0, 1, 2]] * 2, [[0, 1]], [[]], 1.0],
    ids=["NaN", "infinite", "none", "rank 1", "two rows", "too few", "empty", "a number"],
)
def test_logits_that_choose_nothing(logits: object, temperature: float) -> None:
    with pytest.raises(InputError, match=r"the model (computes|returns)"):
        list(decode(Broken(logits), [1], settle(Sampling(2, temperature), {}, 1, 9), ()))
    with pytest.raises(InputError, match=r"the model (computes|returns)"):
        beam_search(Broken(logits), [1], settle(Sampling(2, num_beams=2), {}, 1, 9), ())


def test_a_tiny_temperature_is_greedy() -> None:
    settings = settle(Sampling(1, 1e-310), {}, 1, 9)
    assert list(decode(Broken([[1, 5, 3]]), [1], settings, ())) == [[(0, 1)]]
