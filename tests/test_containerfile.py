"""The Containerfile builds what its page says, as far as can be seen without a container engine."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field

import pytest

from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@dataclass
class Stage:
    """One stage: what it starts from, and its instructions."""

    parent: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.lines if name == instruction]


def stages() -> dict[str, Stage]:
    text = (ROOT / "Containerfile").read_text("utf-8")
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    found: dict[str, Stage] = {}
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            parent, keyword, stage = rest.split()
            assert keyword == "AS"
            found[stage] = Stage(parent)
        else:
            found[stage].lines.append((name, rest))
    return found


STAGES = stages()


def test_targets() -> None:
    assert {*STAGES} == {"build", "build-tf", "base", "tf", "slim"}
    assert [*STAGES][-1] == "slim", "the last stage is the default"
    assert [STAGES[target].parent for target in ("slim", "tf")] == ["base", "base"]


@pytest.mark.parametrize("name", STAGES)
def test_bases_are_stages_or_have_a_version(name: str) -> None:
    parent = STAGES[name].parent
    assert parent in STAGES or re.fullmatch(r"[a-z/.]+:\d[\w.-]+", parent)


@pytest.mark.parametrize("target", ["slim", "tf"])
def test_user_is_not_root(target: str) -> None:
    assert STAGES[target].all("USER") == []
    (user,), arguments = STAGES["base"].all("USER"), STAGES["base"].all("ARG")
    assert user == "${USER}:${USER}" and "USER=10001" in arguments


def test_runtime() -> None:
    base = STAGES["base"]
    assert base.all("ENTRYPOINT") == ['["gptconvert"]']
    assert "HF_HOME=/cache" in base.all("ENV")[0].split() and base.all("VOLUME") == ['["/cache"]']
    labels = " ".join(base.all("LABEL"))
    names = {"title", "description", "source", "documentation", "licenses", "version", "revision"}
    assert {*re.findall(r"org\.opencontainers\.image\.(\w+)=", labels)} == names
    assert f'licenses="{PROJECT["license"]}"' in labels


def test_sources_exist_and_are_in_the_context() -> None:
    """They are what a build of the package needs, and the ignore file allows nothing else."""
    sources = {word for text in STAGES["build"].all("COPY") for word in text.split()[:-1]}
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert sources >= {"gptconvert", "reference_model", PROJECT["readme"], *PROJECT["license-files"]}
    ignored = (ROOT / ".containerignore").read_text("utf-8").split("\n*\n")[1].splitlines()
    assert {line[1:] for line in ignored if line[0] == "!"} == sources


@pytest.mark.parametrize(("stage", "has_tensorflow"), [("build", False), ("build-tf", True)])
def test_packages(stage: str, has_tensorflow: bool) -> None:
    """Pinned by the constraints, from the index of PyTorch without CUDA; the extras exist."""
    (install,) = (line for line in STAGES[stage].all("RUN") if "pip install" in line)
    (extras,) = re.findall(r"'\.\[(.+)\]'", install)
    assert "--constraint constraints.txt" in install
    assert {*extras.split(",")} <= {*PROJECT["optional-dependencies"]}
    assert ("tf" in extras.split(",")) == has_tensorflow
    assert "/whl/cpu" in STAGES["build"].all("ENV")[0]


def test_targets_copy_what_was_installed() -> None:
    for target, build in (("slim", "build"), ("tf", "build-tf")):
        assert STAGES[target].all("COPY") == [f"--from={build} /opt/gptconvert /opt/gptconvert"]
        assert STAGES[build].parent in ("build", STAGES["base"].parent), "the interpreter of both must be the same"
