"""What a graph must offer so that text can be generated with it, whatever exported it: one table for all runtimes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gptconvert.errors import UnsupportedError

#: A size; None or text for any.
Size = int | str | None
#: Name → (numpy's name of the type, shape; None if unknown).
Tensors = Mapping[str, tuple[str, tuple[Size, ...] | None]]

PAST, PRESENT = "past_key_values", "present"
LOGITS = "logits"


@dataclass(frozen=True)
class Role:
    """An input or output of a graph.

    Attributes:
        dtypes: numpy's names of the types it may have.
        rank: number of sizes.
        fixed: sizes that must be numbers.
        required: whether the graph must have it.
    """

    dtypes: tuple[str, ...]
    rank: int
    fixed: tuple[int, ...] = ()
    required: bool = False


INTEGERS, FLOATS = ("int64", "int32"), ("float32", "float16")
INPUTS: Mapping[str, Role] = {
    "input_ids": Role(INTEGERS, 2, required=True),
    "attention_mask": Role(INTEGERS, 2),
    "position_ids": Role(INTEGERS, 2),
}
OUTPUTS: Mapping[str, Role] = {LOGITS: Role(FLOATS, 3, required=True)}
#: Keys and values: batch, heads, tokens, width.
CACHE_INPUT, CACHE_OUTPUT = Role(FLOATS, 4, fixed=(1, 3)), Role(FLOATS, 4)


def check_interface(inputs: Tensors, outputs: Tensors, path: str) -> int | None:
    """Refuse a graph that cannot be fed token by token.

    Returns:
        the size of its vocabulary; None if the graph does not state it.

    Raises:
        UnsupportedError: it lacks an input or output, or one has another type or shape; all are listed.
    """
    problems = list(_problems(inputs, outputs))
    if problems:
        more = f"\n… {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "\n".join(problems[:10])
        raise UnsupportedError(f"the graph cannot generate text\n{listed}{more}", path=path)
    shape = outputs[LOGITS][1]
    size = None if shape is None else shape[2]
    return size if isinstance(size, int) and size > 0 else None


def _problems(inputs: Tensors, outputs: Tensors) -> Iterator[str]:
    for kind, tensors, roles in (("input", inputs, INPUTS), ("output", outputs, OUTPUTS)):
        yield from (f"{kind} {name} is missing" for name, r in roles.items() if r.required and name not in tensors)
        for name, tensor in tensors.items():
            role = roles.get(name)
            if kind == "input" and role is None and name.startswith(f"{PAST}."):
                role = CACHE_INPUT
                present = name.replace(PAST, PRESENT, 1)
                if present not in outputs:
                    yield f"output {present} is missing"
                else:
                    yield from _differences("output", present, outputs[present], CACHE_OUTPUT)
            if role is not None:
                yield from _differences(kind, name, tensor, role)
            elif kind == "input":
                yield f"input {name} is unknown"


def _differences(kind: str, name: str, tensor: tuple[str, tuple[Size, ...] | None], role: Role) -> Iterator[str]:
    dtype, shape = tensor
    if dtype not in role.dtypes:
        yield f"{kind} {name} has the type {dtype}, expected {' or '.join(role.dtypes)}"
    if shape is None or len(shape) != role.rank:
        if shape is not None or role.fixed:
            yield f"{kind} {name} has {'unknown' if shape is None else len(shape)} sizes, expected {role.rank}"
        return
    for at in role.fixed:
        size = shape[at]
        if not isinstance(size, int) or size < 1:
            yield f"{kind} {name} has the shape {list(shape)}, expected a number as size {at}"
