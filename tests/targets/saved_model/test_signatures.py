"""Properties of the signatures that clients rely on, beyond the numbers that the gate compares."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.generation import SpecialIds
from gptconvert.model.options import Options
from gptconvert.targets.saved_model.plan import plan
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess
from tests.families.witness import Case, reference
from tests.targets.saved_model.support import understood, write
from tests.verify.exports import report_on

pytestmark = pytest.mark.tensorflow

PROMPT = np.array([[7, 3, 50, 51, 9]] * 4)
#: No mask, left padding, right padding, a hole.
MASK = np.array([[1] * 5, [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
CONTEXT = 40


@pytest.fixture(scope="module")
def checkpoint(saved: Path) -> Checkpoint:
    return understood(Case("gpt2"), saved)


@pytest.fixture(scope="module")
def path(checkpoint: Checkpoint, tensorflow: TensorFlowProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkpoint, tensorflow, tmp_path_factory.mktemp("signatures"))


def build(checkpoint: Checkpoint, tensorflow: TensorFlowProcess, directory: Path) -> Path:
    from gptconvert.targets.saved_model import plan as model
    from tests.targets.saved_model.support import Shared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "TensorFlowProcess", Shared(tensorflow))
        return write(directory, plan(checkpoint, Options())[0].files)


@pytest.fixture
def loaded(path: Path, tensorflow: TensorFlowProcess) -> TensorFlowProcess:
    tensorflow.ask("load", path=str(path))
    return tensorflow


def generate(
    tensorflow: TensorFlowProcess,
    ids: Any,
    mask: Any,
    new: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Any:
    feeds = {"input_ids": np.asarray(ids), "attention_mask": np.asarray(mask), "max_new_tokens": np.int64(new)}
    choice = {"temperature": np.float32(temperature), "top_k": np.int64(top_k), "seed": np.int64(seed)}
    return tensorflow.run("generate", {**feeds, **choice})["sequences"]  # type: ignore[dict-item]


def greedy(checkpoint: Checkpoint, ids: list[int], new: int) -> list[int]:
    """The reference model's continuation, without padding or cache."""
    import torch

    model = reference(checkpoint)
    for _ in range(new):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]))[0][0, -1].argmax())]
    return ids[-new:]


def test_greedy_is_independent_of_padding(checkpoint: Checkpoint, loaded: TensorFlowProcess) -> None:
    sequences = generate(loaded, PROMPT, MASK, 9)
    assert sequences.dtype == np.int64
    np.testing.assert_array_equal(sequences[:, :5], PROMPT)
    for row, mask, prompt in zip(sequences, MASK, PROMPT, strict=True):
        assert row[5:].tolist() == greedy(checkpoint, prompt[mask == 1].tolist(), 9)


@pytest.mark.parametrize("pad", [95, 97])
def test_generation_ends_at_any_end_token(
    pad: int, checkpoint: Checkpoint, tensorflow: TensorFlowProcess, tmp_path: Path
) -> None:
    vocabulary = checkpoint.config.vocab_size
    free = [greedy(checkpoint, p[m == 1].tolist(), 9) for p, m in zip(PROMPT, MASK, strict=True)]
    end = free[0][2]
    other = next(token for token in free[1] if token not in free[0][:3])
    special = SpecialIds(eos=(end, other, vocabulary), pad=pad)
    path = build(dataclasses.replace(checkpoint, special_ids=special), tensorflow, tmp_path)
    tensorflow.ask("load", path=str(path))
    ends = [min((row.index(e) for e in (end, other) if e in row), default=len(row)) for row in free]
    cut = [row[: at + 1] for row, at in zip(free, ends, strict=True)]
    width = max(len(row) for row in cut)
    filler = end if pad == vocabulary else pad  # rows that have ended are still fed to the model
    expected = [row + [filler] * (width - len(row)) for row in cut]
    assert len({len(row) for row in cut}) > 1
    assert generate(tensorflow, PROMPT, MASK, 9)[:, 5:].tolist() == expected
    assert generate(tensorflow, PROMPT[:1], MASK[:1], 9)[0, 5:].tolist() == cut[0]


def test_gate_with_a_prompt_that_ends_early(
    checkpoint: Checkpoint, shared: TensorFlowProcess, tmp_path: Path
) -> None:
    """The gate's own prompts reach the end token, with a padding id outside the vocabulary."""
    report = report_on(checkpoint, build(checkpoint, shared, tmp_path / "free"))
    greedy_text = report.artifacts[0].greedy
    assert greedy_text is not None
    end = int(greedy_text.input_ids[0, -6])
    odd = dataclasses.replace(checkpoint, special_ids=SpecialIds(eos=(end,), pad=500))
    report = report_on(odd, build(odd, shared, tmp_path / "ended"))
    assert report.passed, report.table()
    assert report.artifacts[0].greedy is not None and report.artifacts[0].greedy.ended((end,)).any()


def test_generation_ends_with_the_context(loaded: TensorFlowProcess) -> None:
    ids = np.arange(CONTEXT - 3)[None]
    assert generate(loaded, ids, np.ones_like(ids), 10).shape == (1, CONTEXT)
    mask = np.ones_like(ids)
    mask[:, :5] = 0  # padding takes no room
    assert generate(loaded, ids, mask, 10).shape == (1, CONTEXT + 5)


def test_sampling_is_reproducible_by_seed(loaded: TensorFlowProcess) -> None:
    texts = [generate(loaded, PROMPT, MASK, 12, temperature=1.0, seed=s).tolist() for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 4), (2.0, 96)])
def test_sampling_follows_the_distribution(
    temperature: float, top_k: int, checkpoint: Checkpoint, loaded: TensorFlowProcess
) -> None:
    import torch

    draws = 4000
    with torch.no_grad():
        logits = reference(checkpoint)(torch.tensor(PROMPT[:1]))[0][0, -1].numpy() / temperature
    kept = np.argsort(-logits)[: top_k or None]
    chances = np.zeros_like(logits)
    chances[kept] = np.exp(logits[kept] - logits.max())
    chances /= chances.sum()
    ids = np.repeat(PROMPT[:1], draws, 0)
    tokens = generate(loaded, ids, np.ones_like(ids), 1, temperature, top_k, seed=3)[:, 5]
    counts = np.bincount(tokens, minlength=len(chances))
    assert not counts[chances == 0].any()
    spread = np.sqrt(draws * chances * (1 - chances))
    assert (np.abs(counts - draws * chances) <= 5 * spread + 1).all()


def test_rows_are_drawn_independently(loaded: TensorFlowProcess) -> None:
    ids = np.repeat(PROMPT[:1], 50, 0)
    assert len(set(generate(loaded, ids, np.ones_like(ids), 1, 1.0)[:, 5].tolist())) > 10


def test_last_logits(loaded: TensorFlowProcess) -> None:
    feeds = {"input_ids": PROMPT, "attention_mask": MASK}
    every, last = loaded.run("serving_default", feeds)["logits"], loaded.run("last_logits", feeds)["logits"]
    np.testing.assert_allclose(last, every[range(4), [4, 4, 2, 4]], atol=1e-5)


def decode_feeds(**changes: Any) -> dict[str, Any]:
    """Two new tokens after a past of three."""
    past = np.random.default_rng(0).standard_normal((1, 3, 3, 8), np.float32)
    cache = {f"past_key_values.{i}.{part}": past for i in range(2) for part in ("key", "value")}
    feeds = {"input_ids": [[1, 2]], "attention_mask": [[1] * 5], "position_ids": [[3, 4]]}
    return {name: np.asarray(value) for name, value in {**feeds, **cache, **changes}.items()}


def test_last_position_is_allowed(loaded: TensorFlowProcess) -> None:
    loaded.run("decode", decode_feeds(position_ids=[[0, CONTEXT - 1]], input_ids=[[0, 96]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": [[1, 97]]}, "input_ids must lie between 0 and 96"),
        ({"input_ids": [[-1, 2]]}, "input_ids must lie between 0 and 96"),
        ({"position_ids": [[3, CONTEXT]]}, "position_ids must lie between 0 and 39"),
        ({"position_ids": [[3, -1]]}, "position_ids must lie between 0 and 39"),
        ({"position_ids": [[3]]}, "position_ids must be shaped as input_ids"),
        ({"attention_mask": [[1] * 4]}, "attention_mask must have the batch of input_ids and a column"),
        ({"attention_mask": [[1]]}, "attention_mask must have the batch of input_ids and a column"),
        ({"attention_mask": [[1] * 5] * 2}, "attention_mask must have the batch of input_ids"),
        ({"input_ids": np.array([[1, 2]], np.int32)}, "int32"),
    ],
)
def test_decode_rejects(changes: dict[str, Any], message: str, loaded: TensorFlowProcess) -> None:
    with pytest.raises(TensorFlowError, match=message):
        loaded.run("decode", decode_feeds(**changes))


def test_rotary_positions_continue_past_the_context(
    saved: Path, tensorflow: TensorFlowProcess, tmp_path: Path
) -> None:
    """To the limit of their tables."""
    tensorflow.ask("load", path=str(build(understood(Case("gptj"), saved), tensorflow, tmp_path)))
    near, far = (
        tensorflow.run("decode", decode_feeds(position_ids=[[start + 3, start + 4]]))["logits"]
        for start in (0, 100_000)
    )
    assert np.isfinite(far).all() and not np.allclose(near, far, atol=1e-3), "the past has other positions"
    with pytest.raises(TensorFlowError, match="position_ids must lie between 0 and 262143"):
        tensorflow.run("decode", decode_feeds(position_ids=[[3, 262_144]]))


def test_serving_rejects_more_than_the_context(loaded: TensorFlowProcess) -> None:
    ids = np.ones((1, CONTEXT + 1), np.int64)
    with pytest.raises(TensorFlowError, match="position_ids must lie between 0 and 39"):
        loaded.run("serving_default", {"input_ids": ids, "attention_mask": ids})


@pytest.mark.parametrize(
    ("length", "new", "temperature", "message"),
    [
        (CONTEXT, 1, 0.0, "the prompt fills the context of 40 tokens"),
        (3, 0, 0.0, "max_new_tokens must be at least 1"),
        (3, 1, -1.0, "temperature must not be negative"),
    ],
)
def test_generate_rejects(length: int, new: int, temperature: float, message: str, loaded: TensorFlowProcess) -> None:
    ids = np.ones((1, length), np.int64)
    with pytest.raises(TensorFlowError, match=message):
        generate(loaded, ids, ids, new, temperature)


def test_contract(path: Path, tensorflow: TensorFlowProcess) -> None:
    """Names, types and shapes as documented."""
    found = tensorflow.ask("load", path=str(path))
    signatures = found["signatures"]
    pair = {"input_ids": ["int64", [None, None]], "attention_mask": ["int64", [None, None]]}
    narrow = {name: ["int32", shape] for name, (_, shape) in pair.items()}
    logits = {"logits": ["float32", [None, None, 97]]}
    past, cache = {}, ["float32", [None, 3, None, 8]]
    for i in range(2):
        past |= {f"past_key_values.{i}.key": cache, f"past_key_values.{i}.value": cache}
    scalars = {name: ["int64", []] for name in ("max_new_tokens", "top_k", "seed")}
    assert signatures == {
        "serving_default": {"inputs": pair, "outputs": logits},
        "serving_int32": {"inputs": narrow, "outputs": logits},
        "decode": {
            "inputs": {**pair, "position_ids": ["int64", [None, None]], **past},
            "outputs": {**logits, **{name.replace("past_key_values", "present"): cache for name in past}},
        },
        "last_logits": {"inputs": pair, "outputs": {"logits": ["float32", [None, 97]]}},
        "generate": {
            "inputs": {**pair, **scalars, "temperature": ["float32", []]},
            "outputs": {"sequences": ["int64", [None, None]]},
        },
    }
    assert found["largest_constant"] < 8192  # names of variables
