"""The list of jobs: keys, options, paths, bad lines, conflicts, shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptconvert.batch.jobs import Entry, parse_job, read_jobs, shard
from gptconvert.batch.results import worst
from gptconvert.errors import UsageError
from gptconvert.model.options import Options

GOOD = {"source": "model", "output": "out"}


def listed(directory: Path, *lines: object, name: str = "jobs.jsonl") -> str:
    path = directory / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def errors(entries: list[Entry]) -> dict[int, str]:
    return {entry.line: f"{entry.error}; {entry.error.hint}" for entry in entries if entry.error is not None}


def test_a_job_with_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = parse_job(
        {
            "source": "models/x",
            "output": "out",
            "format": "openai-tf",
            "targets": ["onnx", "safetensors"],
            "options": {
                "dtype": "fp16",
                "hparams": "h.json",
                "ignore_key": ["a"],
                "verify": False,
                "max_shard_size": "5MB",
            },
            "memory": "2GiB",
        }
    )
    assert (job.source, job.output, job.format) == (str(tmp_path / "models/x"), str(tmp_path / "out"), "openai-tf")
    assert job.options == Options(
        targets=("onnx", "safetensors"),
        dtype="fp16",
        hparams=str(tmp_path / "h.json"),
        ignore_key=("a",),
        verify=None,
        max_shard_size=5_000_000,
    )
    assert job.memory == 2 << 30
    assert parse_job(json.loads(json.dumps(job.as_dict()))) == job


def test_defaults_and_other_spellings() -> None:
    job = parse_job({**GOOD, "command": "convert", "targets": "safetensors,onnx", "options": None, "memory": 5})
    assert (job.format, job.memory) == (None, 5)
    assert job.options == Options(targets=("safetensors", "onnx"))
    assert parse_job({**GOOD, "options": {"verify": True, "dtype": None}}).options == Options()
    assert parse_job({**GOOD, "options": {"verify": None}}).options.verify is None


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("gpt2", "gpt2"),
        ("org/name", "org/name"),
        ("here/name", "{}/here/name"),
        ("model.ckpt", "{}/model.ckpt"),
        ("s3://bucket/model", "s3://bucket/model"),
        ("hf://org/name", "org/name"),
        ("hf://org/name/sub", "hf://org/name/sub"),
    ],
)
def test_paths_become_absolute_and_repositories_stay(
    source: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert parse_job({"source": source, "output": "out"}).source == found.format(tmp_path)


def test_a_hub_url_may_name_a_revision() -> None:
    job = parse_job({"source": "hf://org/name@refs%2Fpr%2F1", "output": "out"})
    assert (job.source, job.options.revision) == ("org/name", "refs/pr/1")


@pytest.mark.parametrize(
    ("job", "parts"),
    [
        ("a", ("a job is an object", "a string")),
        ({"output": "out"}, ("`source` is missing",)),
        ({"source": "x"}, ("`output` is missing",)),
        ({**GOOD, "source": ""}, ("invalid value of `source`",)),
        ({**GOOD, "output": 3}, ("invalid value of `output`",)),
        ({**GOOD, "sorce": "x"}, ("unknown key `sorce` (did you mean `source`?)",)),
        ({**GOOD, "to": "onnx"}, ("did you mean `targets`?",)),
        ({**GOOD, "dtype": "fp16"}, ("did you mean `dtype` in `options`?",)),
        ({**GOOD, "format": "hgf"}, ("unknown source format", "hgf", "did you mean hf?")),
        ({**GOOD, "format": "hf", "command": "hf"}, ("mean the same",)),
        ({**GOOD, "targets": []}, ("invalid `targets`",)),
        ({**GOOD, "targets": ["onxx"]}, ("unknown target", "onxx")),
        ({**GOOD, "options": ["dtype"]}, ("`options` is an object",)),
        ({**GOOD, "options": {"targets": ["tf"]}}, ("targets are not an option",)),
        ({**GOOD, "options": {"dytpe": "fp16"}}, ("unknown option `dytpe` (did you mean `dtype`?)",)),
        ({**GOOD, "options": {"no-verify": True, "--set": "a=b"}}, ("`verify: null`", "`set_key`")),
        ({**GOOD, "options": {"dtype": "fp8"}}, ("invalid value of dtype", "one of fp32, fp16, bf16", "fp8")),
        ({**GOOD, "options": {"opset": "17"}}, ("invalid value of opset",)),
        ({**GOOD, "options": {"xla": True}}, ("--xla has no effect without --to tf",)),
        ({**GOOD, "targets": ["tf"], "options": {"opset": 21}}, ("--opset has no effect without --to onnx",)),
        ({**GOOD, "memory": "lots"}, ("invalid value of `memory`",)),
    ],
)
def test_bad_jobs(job: object, parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_job(job)
    text = f"{caught.value}; {caught.value.hint}"
    assert [part for part in parts if part not in text] == []


def test_bad_lines_have_numbers_and_the_others_run(tmp_path: Path) -> None:
    path = listed(tmp_path, GOOD, "", "nope", '{"source": "x", "source": "y"}', {**GOOD, "output": "b"}, '{"a": NaN}')
    entries = read_jobs(path)
    assert [entry.line for entry in entries] == [1, 3, 4, 5, 6]
    found = errors(entries)
    assert sorted(found) == [3, 4, 6]
    assert "line 3: the job is not JSON: expecting value (column 1)" in found[3]
    assert "line 4: the job is not valid: duplicate key `source`" in found[4]
    assert all(path in text for text in found.values())


def test_characters_that_end_lines_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"source": "a\xe2\x80\xa8b", "output": "out"}\r\n')
    (entry,) = read_jobs(str(path))
    assert entry.job is not None and entry.job.source.endswith("a\u2028b")


def test_yaml(tmp_path: Path) -> None:
    text = "# models\n- source: a\n  output: b\n  options: {dtype: fp16}\n\n- {source: c, ouput: d}\n- just text\n"
    entries = read_jobs(listed(tmp_path, text, name="jobs.yaml"))
    assert [entry.line for entry in entries] == [2, 6, 7]
    assert entries[0].job is not None and entries[0].job.options.dtype == "fp16"
    assert "line 6: unknown key `ouput` (did you mean `output`?)" in errors(entries)[6]
    assert "line 7: a job is an object" in errors(entries)[7]


@pytest.mark.parametrize(
    ("text", "name", "part"),
    [
        ("", "jobs.jsonl", "no jobs in the list"),
        ("\n \n", "jobs.jsonl", "no jobs in the list"),
        ("", "jobs.yaml", "no jobs in the list"),
        ('[{"source": "a", "output": "b"}]', "jobs.jsonl", "a JSON array, not JSON Lines"),
        ("source: a\noutput: b\n", "jobs.yml", "not a list of jobs"),
        ("- source: [\n", "jobs.yaml", "not YAML"),
        ("- &a {source: x}\n- *a\n", "jobs.yaml", "aliases"),
    ],
)
def test_files_that_are_not_lists_of_jobs(tmp_path: Path, text: str, name: str, part: str) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        read_jobs(listed(tmp_path, text, name=name))
    assert caught.value.path == str(tmp_path / name)


@pytest.mark.parametrize(("data", "part"), [(None, "cannot be read"), (b"\xff", "not UTF-8")])
def test_files_that_cannot_be_read(tmp_path: Path, data: bytes | None, part: str) -> None:
    if data is not None:
        (tmp_path / "jobs").write_bytes(data)
    with pytest.raises(UsageError, match=part):
        read_jobs(str(tmp_path / "jobs"))


@pytest.mark.parametrize(
    ("first", "second", "part"),
    [
        ("out", "out", "is that of line 1"),
        ("out", "./x/../out/", "is that of line 1"),
        ("out", "link", "is that of line 1"),
        ("out", "out/b", "is inside that of line 1"),
        ("out/b", "out", "contains that of line 1"),
        ("s3://b/out", "s3://b/out/", "is that of line 1"),
        ("s3://b/out", "s3://b/out/x", "is inside that of line 1"),
        ("out", "file://{}/out", "is that of line 1"),
        ("out", "outer", None),
        ("s3://b/out", "s3://c/out", None),
    ],
)
def test_two_jobs_to_one_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, part: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("out")
    jobs = [{"source": "m", "output": name.format(tmp_path)} for name in (first, second)]
    entries = read_jobs(listed(tmp_path, *jobs))
    assert entries[0].job is not None
    if part is None:
        assert entries[1].job is not None
    else:
        assert f"line 2: the output {part}" in errors(entries)[2]


def test_a_source_that_another_job_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs: list[Any] = [{"source": "./a/openai-tf", "output": "b"}, {"source": "gpt2", "output": "a"}]
    entries = read_jobs(listed(tmp_path, *jobs))
    assert "line 1: the source is the output of line 2" in errors(entries)[1]
    assert entries[1].job is not None


def test_shards_are_disjoint_and_complete(tmp_path: Path) -> None:
    lines = [{"source": "m", "output": f"out/{i}"} for i in range(7)]
    entries = read_jobs(listed(tmp_path, *lines, lines[0]))
    shards = [shard(entries, i, 3) for i in range(3)]
    assert sorted(entry.line for each in shards for entry in each) == list(range(1, 9))
    assert all(len(each) in (2, 3) for each in shards)
    # A conflict is found in the whole list, so that shards do not write to one output.
    assert [entry.line for each in shards for entry in each if entry.error] == [8]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 2], 2),
        ([2, 6, 0], 6),
        ([6, 3, 4], 3),
        ([137, 3], 137),
        ([137, 1], 1),
        ([7, 137, 3], 7),
        ([7, 5, 1, 137, 0], 5),
    ],
)
def test_the_worst_exit_code(codes: list[int], code: int) -> None:
    assert worst(codes) == code
