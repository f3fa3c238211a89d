"""Verification of one ONNX file: whose weights run, what runs concurrently, and what happens on failure."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.transforms import cast, transpose
from gptconvert.publish.source_reader import StoppedError
from gptconvert.targets.onnx.file import open_onnx
from gptconvert.targets.onnx.foreign import pair_up
from gptconvert.targets.onnx.runner import OnnxRunner, bind
from gptconvert.targets.onnx.verify import DEFAULT, IN_PLACE, LENT, OnnxVerifier, Runs
from gptconvert.verify.probes import make_probes
from gptconvert.verify.run_probes import feeds_of
from gptconvert.verify.weights import Pair, compare, in_one_piece
from tests.commands import TINY, command
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import checkpoint_of, computed_tensors, tiny_gpt2
from tests.verify.exports import export, report_on, tiny


class Spy(OnnxRunner):
    """Records the names of the weights lent to each session."""

    lent: ClassVar[list[set[str]]] = []

    def __init__(self, *arguments: Any, lent: Any = None, **fields: Any) -> None:
        self.lent.append(set(lent or ()))
        super().__init__(*arguments, lent=lent, **fields)


def spied(checkpoint: Checkpoint, path: Path, **fields: Any) -> tuple[list[str], list[set[str]]]:
    """The runtimes that a graph passed, and the weights lent to each."""
    Spy.lent.clear()
    report = report_on(checkpoint, path, verifiers={"onnx": OnnxVerifier(runner=Spy, **fields)})
    assert report.passed
    return [run.runtime for run in report.artifacts[0].runs], list(Spy.lent)


def test_small_model_runs_with_the_files_weights(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    assert spied(checkpoint, export(tmp_path, checkpoint)) == ([DEFAULT], [set()])


def test_large_model_runs_with_the_sources_weights(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    assert spied(checkpoint, export(tmp_path, checkpoint), small_model=0) == ([LENT], [set(checkpoint.weights)])


def test_foreign_file_runs_with_its_own_weights(tmp_path: Path) -> None:
    from tests.verify.exports import edit
    from tests.verify.test_families import disown

    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, disown)
    assert spied(checkpoint, path, small_model=0) == ([IN_PLACE], [set()])


def test_weights_that_can_be_lent(tmp_path: Path) -> None:
    """Contiguous, aligned, of the file's own shape and type."""
    checkpoint = tiny(tmp_path)
    file = open_onnx(str(export(tmp_path, checkpoint)))
    _, pairs = pair_up(file, checkpoint.weights)
    by_name = {pair.name: (pair.expected, pair.found) for pair in pairs}
    assert set(in_one_piece(pairs)) == set(checkpoint.weights)
    expected, found = by_name["h.0.mlp.c_fc.weight"]
    for other in (transpose(expected), cast(expected, BFLOAT16), computed_tensors({"x": expected.read()})["x"]):
        assert in_one_piece([Pair("w", "w", other, found)]) == {}
    odd = tiny(tmp_path / "odd", start=1)
    _, pairs = pair_up(open_onnx(str(export(tmp_path / "odd", odd))), odd.weights)
    assert len(pairs) == len(odd.weights) and in_one_piece(pairs) == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
def test_session_uses_lent_weights(tmp_path: Path, dtype: Any) -> None:
    """With another export's weights, a graph computes the other's outputs, bit for bit."""
    runs = []
    for seed in (1, 2):
        checkpoint = tiny(tmp_path / str(seed), seed, dtype=dtype)
        file = open_onnx(str(export(tmp_path / str(seed), checkpoint)))
        runs.append((checkpoint, file, bind(file, checkpoint.config)))
    (first, first_file, binding), (second, second_file, _) = runs
    feeds = feeds_of(make_probes(first.config, kv_cache=True)[2], first.config)
    _, pairs = pair_up(second_file, second.weights)
    own = [OnnxRunner(f, binding, c.config).run(feeds, True).named["logits"] for c, f, _ in runs]
    lent = OnnxRunner(first_file, binding, first.config, lent=in_one_piece(pairs)).run(feeds, True).named["logits"]
    assert np.array_equal(lent, own[1]) and not np.array_equal(*own)


def test_weights_are_compared_while_the_graph_runs(tmp_path: Path) -> None:
    """This comparison ends only after the first run has begun."""
    running = threading.Event()

    def waiting(*arguments: Any, **fields: Any) -> Any:
        assert running.wait(60)
        return compare(*arguments, **fields)

    class Starting(OnnxRunner):
        def run(self, feeds: Any, presents: bool) -> Any:
            running.set()
            return super().run(feeds, presents)

    checkpoint = tiny(tmp_path)
    verifier = OnnxVerifier(runner=Starting, compare=waiting)
    report = report_on(checkpoint, export(tmp_path, checkpoint), verifiers={"onnx": verifier})
    assert report.passed and report.artifacts[0].weights.equal == len(checkpoint.weights)


@pytest.mark.parametrize("most", [0, 1 << 30], ids=["large", "small"])
def test_runs_with_wrong_weights_do_not_count(tmp_path: Path, most: int) -> None:
    """The graph is correct with lent weights, but the file's are wrong."""
    checkpoint = tiny(tmp_path)
    data = export(tmp_path, checkpoint).with_name("model.onnx_data")
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    report = report_on(checkpoint, tmp_path, verifiers={"onnx": OnnxVerifier(small_model=most)})
    assert not report.passed and not report.artifacts[0].runs
    assert "differs from its source" in report.table() and "outputs: not run" in report.table()


def test_read_error_during_comparison_fails(tmp_path: Path) -> None:
    def unreadable(report: Any, pairs: Any, stop: Any) -> Any:
        raise InputError("cannot be read (Input/output error)")

    checkpoint = tiny(tmp_path)
    with pytest.raises(InputError, match="Input/output error"):
        report_on(checkpoint, export(tmp_path, checkpoint), verifiers={"onnx": OnnxVerifier(compare=unreadable)})


class Halt(Exception):
    pass


class Halting(OnnxRunner):
    def run(self, feeds: Any, presents: bool) -> Any:
        raise Halt


def test_failing_run_cancels_comparison_and_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: dict[str, BaseException] = {}

    def endless(name: str, stop: threading.Event) -> Any:
        assert stop.wait(60)
        ended[name] = StoppedError()
        raise StoppedError

    monkeypatch.setattr(Runs, "_truth", lambda self, wave, stop, alone: endless("truth", stop))
    checkpoint = tiny(tmp_path)
    verifier = OnnxVerifier(runner=Halting, compare=lambda report, pairs, stop: endless("comparison", stop))
    with pytest.raises(Halt):
        report_on(checkpoint, export(tmp_path, checkpoint), verifiers={"onnx": verifier})
    assert set(ended) == {"comparison", "truth"}


def test_truth_is_cancelled_between_blocks(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    file = open_onnx(str(export(tmp_path, checkpoint)))
    runs = Runs(file, checkpoint, {}, "default", lambda name, total: lambda count: None)
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        runs._truth(runs.probes, stop, threading.Event())


def test_torch_threads_are_restored(tmp_path: Path) -> None:
    import torch

    checkpoint, before = tiny(tmp_path), torch.get_num_threads()
    assert report_on(checkpoint, export(tmp_path, checkpoint)).passed
    assert torch.get_num_threads() == before


def test_nan_in_the_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    """Raised in the truth's thread while the graph runs."""
    raw, arrays = tiny_gpt2()
    arrays["transformer.h.1.mlp.c_fc.bias"][3] = np.nan
    checkpoint = checkpoint_of(raw, arrays, tmp_path, request=Options())
    with pytest.raises(InputError, match="checkpoint itself computes NaN"):
        report_on(checkpoint, export(tmp_path, checkpoint))


def test_large_rotary_tables_are_known(tmp_path: Path) -> None:
    """128 rotated features: tables of 8192 numbers, which are not mistaken for stray weights unless altered."""
    from tests.families import witness
    from tests.verify.exports import edit

    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "rope_type": "default"}
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1, "rope_parameters": rope}
    checkpoint = witness.checkpoint(witness.Case("gpt_neox", keys=sizes, name="128"), tmp_path, Options())
    path = export(tmp_path, checkpoint)
    assert report_on(checkpoint, path).passed

    def alter(model: Any) -> None:
        (table, *_) = (t for t in model.graph.initializer if list(t.dims) == [64, 1, 128])
        table.raw_data = table.raw_data[:-4] + b"\0\0\0\0"

    edit(path, alter)
    problems = report_on(checkpoint, path).artifacts[0].weights.problems
    assert len(problems) == 1 and problems[0].endswith(": not a weight of this model")


def test_weights_smaller_than_the_rotary_tables(tmp_path: Path) -> None:
    """The weights alone, not the float32 tables, show that they were cast."""
    sizes = {"vocab_size": 2, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_inner": 7}
    checkpoint = witness.checkpoint(Case("gptj", keys=sizes, name="small"), tmp_path)
    report = report_on(checkpoint, export(tmp_path / "out", checkpoint, dtype="fp16"))
    assert report.passed, report.table()


class Triggered(OnnxRunner):
    """Computes something else for a batch of four."""

    def run(self, feeds: Any, presents: bool) -> Any:
        outputs = super().run(feeds, presents)
        wrong = {name: array + (len(feeds.input_ids) == 4) for name, array in outputs.named.items()}
        return dataclasses.replace(outputs, named=wrong)


def test_full_finds_what_waits_for_a_batch_size(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    verifiers = {"onnx": OnnxVerifier(runner=Triggered)}
    assert report_on(checkpoint, path, verifiers=verifiers).passed
    assert not report_on(checkpoint, path, "full", verifiers=verifiers).passed


@pytest.mark.parametrize("name", ["gptconvert.targets.onnx.runner.open_session", "onnx.load_model"])
def test_a_disk_that_fails_under_our_own_graph_is_an_error_of_the_output(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(name, fail)
    done = command(capsys, "convert", TINY / "openai-tf", "--to", "onnx", "-o", tmp_path / "out")
    assert (done.code, os.listdir(tmp_path)) == (6, [])
    assert os.strerror(errno.EIO) in done.err
