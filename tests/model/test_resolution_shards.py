"""Joining parts, and naming tensors of files without names, with small tables and plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.assembly import assemble, cut, in_order
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.resolution import resolve
from gptconvert.model.schemes import Drop, Order, Row, Scheme, Tied, Variant
from gptconvert.model.shards import (
    COLUMNS,
    EITHER,
    FIRST,
    ROWS,
    SUM,
    Copies,
    Merge,
    Parts,
    Shards,
    added_to_rows,
    merge_parts,
)
from gptconvert.model.source import Run, Source
from gptconvert.model.tensors import FileChecksum, LazyTensor, Segment, Stored, TensorSet
from gptconvert.model.transforms import Transpose
from reference_model.config import GPTConfig
from tests.helpers import computed_tensors, source_of, stored_tensors

F4 = np.dtype(np.float32)
NORMS, BIASES = Copies("norms", averaged=True), Copies("biases")
RULES: dict[str, Shards] = {
    "rows": ROWS,
    "columns": COLUMNS,
    "either": EITHER,
    "sum": SUM,
    "first": FIRST,
    "norms": NORMS,
    "biases": BIASES,
}


def lazy(*arrays: Any) -> tuple[LazyTensor, ...]:
    named = {str(number): np.asarray(array) for number, array in enumerate(arrays)}
    return tuple(computed_tensors(named).values())


def numbers(*shape: int, seed: int = 0, dtype: Any = F4) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def read(tensors: Sequence[LazyTensor]) -> list[Any]:
    return [tensor.read() for tensor in tensors]


# Rules


@pytest.mark.parametrize("dtype", [F4, np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", RULES)
def test_merge_undoes_split(name: str, count: int, dtype: Any) -> None:
    rule, whole = RULES[name], numbers(count * 3, count * 7, seed=count, dtype=dtype)
    parts = rule.split(lazy(whole)[0], count)
    merged = rule.merge(parts, whole.shape)
    assert (len(parts), merged.shape, merged.dtype) == (count, whole.shape, dtype)
    assert np.array_equal(merged.read(), whole)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rule", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_split_undoes_merge(rule: Shards, seed: int) -> None:
    random = np.random.default_rng(seed)
    count, height, width = (int(n) for n in random.integers(1, 7, 3))
    arrays = [numbers(height, width, seed=100 * seed + k) for k in range(count)]
    parts = lazy(*arrays)
    shape = (height * count, width) if rule is ROWS else (height, width * count)
    whole = rule.merge(parts, shape)
    assert whole.shape == shape
    again = read(rule.split(whole, count))
    assert all(np.array_equal(before, after) for before, after in zip(arrays, again, strict=True))


def test_rows_and_columns_are_concatenated() -> None:
    a, b = numbers(2, 3), numbers(2, 3, seed=1)
    assert np.array_equal(ROWS.merge(lazy(a, b), (4, 3)).read(), np.concatenate([a, b]))
    assert np.array_equal(COLUMNS.merge(lazy(a, b), (2, 6)).read(), np.concatenate([a, b], 1))
    assert np.array_equal(ROWS.merge(lazy(a[0], b[0]), (6,)).read(), np.concatenate([a[0], b[0]]))


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), 0), ((2, 6), 1), ((9, 9), 1), ((), 0)])
def test_the_shape_decides_between_rows_and_columns(shape: tuple[int, ...], axis: int) -> None:
    a, b = numbers(2, 3), numbers(2, 3, seed=1)
    assert np.array_equal(EITHER.merge(lazy(a, b), shape).read(), np.concatenate([a, b], axis))


def test_sums_are_rounded_once() -> None:
    """In bfloat16, 256 + 1 + 1 is 258 only if 257 is never rounded."""
    parts = [np.array([value], BFLOAT16) for value in (256, 1, 1)]
    assert SUM.merge(lazy(*parts), (1,)).read() == 258


def test_sums_are_added_to_rows_and_rounded_once() -> None:
    table, biases = np.full((2, 3), 256, BFLOAT16), [np.array([1, 0, 2], BFLOAT16), np.array([1, 0, 0], BFLOAT16)]
    found = added_to_rows(lazy(table)[0], lazy(*biases))
    assert np.array_equal(found.read(), np.array([[258, 256, 258]] * 2, BFLOAT16))
    assert np.array_equal(found.read((slice(1, 2), slice(0, 2))), np.array([[258, 256]], BFLOAT16))


def test_equal_copies_give_the_first() -> None:
    parts = lazy(*[numbers(5)] * 3)
    assert all(rule.merge(parts, (5,)) is parts[0] for rule in (FIRST, NORMS, BIASES))


def test_differing_copies() -> None:
    a, b, c = (numbers(5, seed=seed) for seed in range(3))
    parts = lazy(a, b, c)
    assert FIRST.merge(parts, (5,)) is parts[0]
    assert BIASES.merge(parts, (5,)) is parts[0]
    mean = np.mean(np.stack([a, b, c]).astype(np.float64), axis=0).astype(F4)
    assert np.array_equal(NORMS.merge(parts, (5,)).read(), mean)


# Parts of a file


def parts(*arrays: Any, **fields: Any) -> Parts:
    return Parts(lazy(*arrays), **fields)


def test_differing_copies_are_noted_by_kind() -> None:
    a, b = numbers(4), numbers(4, seed=1)
    tensors = {
        "g0": parts(a, b, unit="rank"),
        "g1": parts(a, b, unit="rank"),
        "g2": parts(a, a, unit="rank"),
        "b0": parts(a, b, unit="rank"),
        "f0": parts(a, b, unit="rank"),
        "mask": parts(a, b, unit="rank"),
    }
    rules = {"g0": NORMS, "g1": NORMS, "g2": NORMS, "b0": BIASES, "f0": FIRST}
    whole, notes = merge_parts(tensors, {name: Merge(rule, (4,)) for name, rule in rules.items()})
    assert notes == (
        "2 norms differ between ranks but should not (first: g0); used their mean",
        "1 biases differ between ranks but should not (first: b0); used the copies of rank 0",
    )
    assert [*whole] == [*tensors]
    assert all(np.array_equal(whole[name].read(), a) for name in ("g2", "b0", "f0", "mask"))


@pytest.mark.parametrize("name", RULES)
def test_a_single_part_is_the_whole_tensor(name: str) -> None:
    tensors = {"x": parts(numbers(3, 3))}
    whole, notes = merge_parts(tensors, {"x": Merge(RULES[name], (3, 3))})
    assert whole["x"] is tensors["x"].held[0]
    assert not notes


def test_whole_tensors_are_unchanged() -> None:
    (tensor,) = lazy(numbers(3))
    assert merge_parts({"x": tensor}, {"x": Merge(SUM, (3,))}) == ({"x": tensor}, ())


def test_vectors_added_to_rows_are_not_separate_tensors() -> None:
    tables, biases = (numbers(2, 3), numbers(2, 3, seed=1)), (numbers(3, seed=2), numbers(3, seed=3))
    tensors = {"b": parts(*biases), "w": parts(*tables)}
    whole, _ = merge_parts(tensors, {"w": Merge(ROWS, (4, 3), "b")})
    assert [*whole] == ["w"]
    assert np.array_equal(whole["w"].read(), np.concatenate(tables) + (biases[0] + biases[1]))


def test_joined_rows_stay_copyable(tmp_path: Path) -> None:
    stored = tuple(stored_tensors(tmp_path / "f", {name: numbers(2, 3) for name in "abc"}).values())
    rows, columns = ROWS.merge(stored, (6, 3)), COLUMNS.merge(stored, (2, 9))
    assert isinstance(rows, Stored)
    assert rows.segments() == (Segment(str(tmp_path / "f"), 1, 72),)
    assert columns.segments() is None
    assert np.array_equal(columns.read((slice(0, 2), slice(2, 4))), np.concatenate(read(stored), 1)[:, 2:4])


def test_parts_have_the_shape_of_the_whole_tensor() -> None:
    some = parts(numbers(2, 3), numbers(2, 3))
    shapes = [replace(some, axis=axis).shape for axis in (None, 0, 1)]
    assert shapes == [(2, 3), (4, 3), (2, 6)]
    assert Parts((None, None)).shape == ()


# A name table over parts


def config_of(layers: int = 2) -> GPTConfig:
    return GPTConfig(
        family="gpt2",
        vocab_size=6,
        n_ctx=5,
        n_embd=4,
        n_layer=layers,
        n_head=2,
        n_inner=8,
        attn_scale=(0.5,) * layers,
        attn_window=(None,) * layers,
    )


TABLE = Scheme(
    name="test",
    anchor="emb/w",
    prefixes=("m/",),
    write_prefix="m/",
    rows=(
        Row("wte.weight", "emb/w", "V D", shards=ROWS, added="emb/b"),
        Row("h.{i}.ln.weight", "l{i}/g", "D", shards=NORMS),
        Row("h.{i}.proj.weight", "l{i}/proj", "D D", (Transpose(),), shards=COLUMNS),
        Row("h.{i}.out.bias", "l{i}/out", "D", when=lambda c: c.n_layer == 2, shards=SUM),
        Row("h.{i}.out.bias", "l{i}/out", "D", when=lambda c: c.n_layer != 2, shards=FIRST),
        Row("lm_head.weight", "head/w", "V D", when=lambda c: False, shards=EITHER),
    ),
    drops=(Drop("step", "counter"), Drop("head/w", "head")),
    order=Order("name", last=("step",), optimizer=(2, 2)),
)


def whole_arrays(layers: int = 2) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {"emb/w": (6, 4), "head/w": (6, 4)}
    for i in range(layers):
        shapes |= {f"l{i}/g": (4,), f"l{i}/proj": (4, 4), f"l{i}/out": (4,)}
    return {f"m/{name}": numbers(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}


def sharded(layers: int = 2) -> dict[str, Parts]:
    """The arrays in two parts each; summands are halves, the embedding's biases are 1 and 2."""
    found = {"m/emb/b": parts(np.full(4, 1, F4), np.full(4, 2, F4)), "step": parts(np.int32(7), np.int32(7))}
    for name, array in whole_arrays(layers).items():
        last = name.rsplit("/", 1)[1]
        cut_parts = {"proj": lambda a: np.split(a, 2, 1), "g": lambda a: [a, a], "out": lambda a: [a / 2, a / 2]}
        found[name] = parts(*cut_parts.get(last, lambda a: np.split(a, 2))(array))
    return found


def source(tensors: dict[str, Any], **fields: Any) -> Source:
    return source_of({}, TensorSet(tensors, ()), scheme="test", **fields)


def check_weights(weights: Any, arrays: dict[str, Any], share: float = 1) -> None:
    assert np.array_equal(weights["wte.weight"].read(), arrays["m/emb/w"] + np.float32(3))
    assert np.array_equal(weights["h.1.proj.weight"].read(), arrays["m/l1/proj"].T)
    assert np.array_equal(weights["h.0.ln.weight"].read(), arrays["m/l0/g"])
    assert np.array_equal(weights["h.1.out.bias"].read(), arrays["m/l1/out"] * np.float32(share))


def test_parts_are_joined_by_the_table() -> None:
    named = assemble(TABLE, source(sharded()))
    assert named["m/emb/w"].shape == (6, 4)
    assert named["m/l0/proj"].shape == (4, 4)
    found = resolve(TABLE, config_of(), named)
    check_weights(found.weights, whole_arrays())
    assert found.dropped == {"step": "counter", "m/head/w": "head"}
    assert not any(isinstance(tensor, Parts) for tensor in found.tensors.values())
    assert np.array_equal(found.tensors["m/head/w"].read(), whole_arrays()["m/head/w"])


def test_the_rule_may_depend_on_the_configuration() -> None:
    found = resolve(TABLE, config_of(3), assemble(TABLE, source(sharded(3))))
    check_weights(found.weights, whole_arrays(3), share=0.5)


def test_differing_norms_are_noted_and_averaged() -> None:
    tensors = sharded()
    tensors["m/l1/g"] = parts(np.zeros(4, F4), np.ones(4, F4))
    found = resolve(TABLE, config_of(), assemble(TABLE, source(tensors)))
    assert np.array_equal(found.weights["h.1.ln.weight"].read(), np.full(4, 0.5))
    assert found.notes == ("1 norms differ between shards but should not (first: m/l1/g); used their mean",)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("m/l0/g", Parts((*lazy(numbers(4)), None), "rank"), "tensor is missing on rank 1$"),
        ("m/l0/g", Parts((None, None), "rank"), "tensor is missing on rank 0, 1$"),
        ("m/l0/g", parts(numbers(4), numbers(3)), "the shards' parts differ in shape;"),
        ("m/l1/proj", parts(numbers(4, 1), numbers(4, 1)), "shards are missing.* from 2 shards, found parts of"),
    ],
)
def test_inconsistent_parts_are_rejected(name: str, wrong: Parts, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        assemble(TABLE, source({**sharded(), name: wrong}))
    assert (caught.value.item, caught.value.path) == (name, "model")


def test_wrong_shapes_are_those_of_the_whole_tensor() -> None:
    tensors = {**sharded(), "m/emb/w": parts(numbers(2, 4), numbers(2, 4)), "m/l0/out": parts(numbers(3), numbers(3))}
    with pytest.raises(InputError) as caught:
        resolve(TABLE, config_of(), assemble(TABLE, source(tensors)))
    assert "wrong shape m/emb/w: expected [6, 4], found [4, 4]" in str(caught.value)
    assert "wrong shape m/l0/out: expected [4], found [3]" in str(caught.value)


def test_tied_parts_are_joined_by_the_row_with_their_name() -> None:
    table = replace(TABLE, drops=(Drop("step", "counter"),), tied=(Tied("head/w", "wte.weight", "V D", head=False),))
    tensors = sharded()
    tensors["m/head/w"] = parts(*np.split(whole_arrays()["m/head/w"], 2, 1))
    found = resolve(table, config_of(), assemble(table, source(tensors)))
    assert np.array_equal(found.tensors["m/head/w"].read(), whole_arrays()["m/head/w"])


VARIANTS = (Variant(r".*/moe/.*", "experts (moe)"), Variant(r"l\d+/rms", "another norm (norm)"))


@pytest.mark.parametrize(
    ("extra", "message", "hint"),
    [
        (["m/l0/moe/w"], r"not implemented: experts \(moe\); found m/l0/moe/w", True),
        (["m/l1/rms", "m/l0/moe/w"], r"another norm \(norm\), experts \(moe\); found m/l1/rms, m/l0/moe/w", True),
        (["m/l0/what"], "not implemented: unknown tensors; found m/l0/what", False),
    ],
)
def test_variants_are_rejected_by_name(extra: list[str], message: str, hint: bool) -> None:
    table, tensors = replace(TABLE, variants=VARIANTS), sharded()
    assemble(table, source(tensors))
    with pytest.raises(UnsupportedError, match=message) as caught:
        assemble(table, source({**tensors, **dict.fromkeys(extra, Parts((*lazy(numbers(2)), None)))}))
    assert (caught.value.hint is not None) == hint


def test_file_names_may_be_renamed_to_the_tables() -> None:
    table = replace(TABLE, renamed=lambda names, path: {name: name.replace("x/", "m/") for name in names})
    tensors: dict[str, Any] = {name.replace("m/", "x/"): tensor for name, tensor in sharded().items()}
    check_weights(resolve(table, config_of(), assemble(table, source(tensors))).weights, whole_arrays())


# Files without names


def names_in(by: Any, layers: int, **fields: Any) -> list[str]:
    rows = (
        Row("b.weight", "b", "D"),
        Row("h.{i}.y", ("l{i}/y", "l{i}/x"), "D"),
        Row("h.{i}.a", "l{i}/a", "D"),
        Row("c.weight", "a", "D", added="a2"),
    )
    table = Scheme("test", rows, "b", order=Order(by, **fields))
    return [name for _, name in in_order(table, layers)]


def test_orders() -> None:
    assert names_in("layer", 2) == ["b", "a", "a2", "l0/y", "l0/x", "l0/a", "l1/y", "l1/x", "l1/a"]
    assert names_in("row", 2) == ["b", "l0/y", "l0/x", "l1/y", "l1/x", "l0/a", "l1/a", "a", "a2"]
    assert names_in("name", 2) == ["a", "a2", "b", "l0/a", "l0/x", "l0/y", "l1/a", "l1/x", "l1/y"]
    tenth = names_in("name", 11)
    assert tenth.index("l10/a") == tenth.index("l1/y") + 1
    assert names_in("layer", 11)[-3:] == ["l10/y", "l10/x", "l10/a"]


def in_file(layers: int) -> list[LazyTensor]:
    tensors = {**sharded(layers)}
    return [*(tensors[name] for _, name in in_order(TABLE, layers)), tensors["step"]]


@pytest.mark.parametrize("layers", [2, 11])
def test_unnamed_arrays_are_named_by_position(layers: int) -> None:
    named = assemble(TABLE, source({}, unnamed=tuple(in_file(layers))))
    assert [*named] == [*(name for _, name in in_order(TABLE, layers)), "step"]
    check_weights(resolve(TABLE, config_of(layers), named).weights, whole_arrays(layers), 1 if layers == 2 else 0.5)


def summed(name: str) -> FileChecksum:
    return FileChecksum(Segment("file", 0, 1), "crc32", 0, name)


def test_optimizer_arrays_are_left_out_with_their_checksums() -> None:
    arrays = [replace(part, checksums=(summed("own"),)) for part in in_file(2) if isinstance(part, Parts)]
    other = Parts(lazy(np.int32(1), np.int32(1)), checksums=(summed("optimizer's"),))
    count = 2 * (len(arrays) - 1) + 2
    named = assemble(TABLE, source({}, unnamed=(*[other] * count, *arrays)))
    assert named.notes == (f"{count} optimizer arrays are left out",)
    assert {checksum.what for checksum in named.checksums} == {"own"}
    assert len(named.checksums) == len(arrays)
    check_weights(resolve(TABLE, config_of(), named).weights, whole_arrays())


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9, 11])
def test_impossible_numbers_of_arrays_are_rejected(count: int) -> None:
    """TABLE has three tensors outside the layers (the head always counts) and three per layer."""
    with pytest.raises(InputError, match="does not match any number of layers") as caught:
        assemble(TABLE, source({}, unnamed=lazy(*[numbers(2)] * count)))
    assert caught.value.expected == "3 L + 4 for L layers, with optimizer state 9 L + 12"
    assert caught.value.found == f"{count} arrays"


def test_tables_of_files_with_names_have_no_order() -> None:
    with pytest.raises(ValueError, match="has no order"):
        in_order(replace(TABLE, order=None), 2)


# Files without boundaries

RUN = Scheme(
    name="test",
    anchor="e",
    rows=(Row("wte.weight", "e", "V D"), Row("h.{i}.w", "w{i}", "2D D"), Row("b", "b", "D")),
    order=Order("row", padded={"e": "P"}),
)


def run(tmp_path: Path, extra: int = 0, start: int = 12) -> tuple[Run, Any]:
    """A header, 8 rows (the last two are padding), two matrices and a vector."""
    values = numbers(8 * 4 + 2 * 8 * 4 + 4)
    data = bytes(start) + values.tobytes()
    data = data[:extra] if extra < 0 else data + bytes(extra)
    (tmp_path / "f").write_bytes(data)
    return Run(Segment(str(tmp_path / "f"), start, len(data) - start), F4, {"P": 8}), values


def test_a_run_is_cut_by_shape_without_padding(tmp_path: Path) -> None:
    found, values = run(tmp_path)
    tensors = cut(RUN, config_of(), found)
    assert [(name, tensor.shape) for name, tensor in tensors.items()] == [
        ("e", (6, 4)),
        ("w0", (8, 4)),
        ("w1", (8, 4)),
        ("b", (4,)),
    ]
    starts = {"e": 0, "w0": 32, "w1": 64, "b": 96}
    for name, tensor in tensors.items():
        assert isinstance(tensor, Stored)
        assert len(tensor.parts) == 1
        assert np.array_equal(tensor.read().reshape(-1), values[starts[name] : starts[name] + tensor.size])
    assert resolve(RUN, config_of(), tensors).weights.keys() == {"wte.weight", "h.0.w", "h.1.w", "b"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (-1, "truncated"),
        (-4, "truncated"),
        (1, "longer than its header implies"),
        (4, "longer than its header implies"),
    ],
)
def test_a_run_of_the_wrong_length_is_rejected(tmp_path: Path, extra: int, message: str) -> None:
    found, _ = run(tmp_path, extra)
    with pytest.raises(InputError, match=f"{message}; expected 412 bytes, found {412 + extra} bytes") as caught:
        cut(RUN, config_of(), found)
    assert (caught.value.hint is not None) == (extra < 0)
