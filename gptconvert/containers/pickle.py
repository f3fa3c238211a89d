"""A pickle interpreter that only builds plain data.

Python's unpickler imports and calls the functions that a file names, and sets no bound on memory or recursion. This
one interprets the opcodes itself: a *global* becomes a :class:`Global`, a pair of strings that is never imported; a
call is looked up in the reader's table, and a global missing from the table is refused by name. Memory and time are
bounded by the number of bytes and opcodes read.
Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import math
import pickletools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, cast

from gptconvert.errors import InputError, UnsafeInputError

#: Maximum bytes of pickle read from one file: the names and shapes of the largest GPT take less than 1 MiB.
MAX_BYTES = 64 << 20
#: Maximum number of opcodes executed, about two seconds of work: a tensor takes about 30.
MAX_OPCODES = 600_000
#: Maximum size of the object if every shared part were copied: characters, and values in containers.
MAX_EXPANDED = 64 << 20
#: Integers from here on are refused; and as keys of a dictionary, those whose hash is not the number itself: they can
#: be chosen so that all keys collide.
_MAX_INTEGER, _MAX_KEY = 1 << 128, 1 << 60

RESAVE = "in an environment where you trust the file: torch.save(model.state_dict(), 'pytorch_model.bin')"


@dataclass(frozen=True, slots=True)
class Global:
    """A module attribute named in the file; it is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Opaque:
    """A placeholder for a harmless value that is not needed; ``what`` describes it (``numpy scalar``)."""

    what: str


class Attributes(dict[object, object]):
    """The attributes of a plain-data object (``argparse.Namespace``, a dataclass), by name."""


#: Packages whose objects are never plain data; others are read as data if nothing but their attributes is stored.
_NEVER_DATA = frozenset((*sys.stdlib_module_names, "__builtin__", "torch", "numpy", "cupy", "tensorflow", "jax"))
#: Attributes of a PyTorch module: a whole model.
_MODULE_ATTRIBUTES = frozenset(("_parameters", "_modules"))


@dataclass(frozen=True)
class Rules:
    """The globals that one kind of file may use.

    Attributes:
        calls: global → function that replaces it in calls.
        values: globals that may appear but not be called (storage types, dtypes).
        persistent: maps the id of an object outside the pickle (a storage) to its replacement.
    """

    calls: Mapping[Global, Callable[[tuple[object, ...]], object]]
    values: frozenset[Global]
    persistent: Callable[[object], object]


class RefusedError(Exception):
    """Invalid opcodes or arguments. :func:`load_pickle` turns it into an :class:`InputError`."""


def load_pickle(file: BinaryIO, rules: Rules, path: str) -> object:
    """The object of the pickle at the file's position, which moves to the end of the pickle.

    Dictionaries and ordered dictionaries become ``dict``, sets become lists in undefined order.

    The object has no cycles, and is small even if every shared part is copied: code that walks it or prints it takes
    bounded time.

    Raises:
        UnsafeInputError: the pickle uses a global or an opcode that ``rules`` do not allow, or is too long or expands
            too far.
        InputError: the pickle is damaged or truncated.
    """
    machine = _Machine(rules, path)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast("BinaryIO", _Bounded(file, path)))):
            if count > MAX_OPCODES:
                raise UnsafeInputError(
                    "pickle refused: too long", path=path, expected=f"at most {MAX_OPCODES} opcodes"
                )
            machine.step(opcode.name, argument)
    except RefusedError as error:
        raise InputError(f"pickle is damaged: {error}", path=path) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        raise InputError(f"pickle is damaged ({error})", path=path) from error
    if _expanded_size(machine.result) > MAX_EXPANDED:
        raise UnsafeInputError("pickle refused: it contains itself, or the same large part very often", path=path)
    return machine.result


def _expanded_size(value: object) -> float:
    """The size of ``value`` if every shared part were copied, in time proportional to what is stored.

    Infinite if it contains itself. Without recursion: nesting may be as deep as the pickle is long.
    """
    sizes: dict[int, float] = {}  # of containers by identity; infinite until all their parts are measured
    stack: list[tuple[object, bool]] = [(value, False)]
    while stack:
        node, measured = stack.pop()
        if measured:
            sizes[id(node)] = 1 + sum(_size_of(part, sizes) for part in _parts(node))
        elif isinstance(node, (dict, list, tuple)) and id(node) not in sizes:
            sizes[id(node)] = math.inf
            stack.append((node, True))
            stack += [(part, False) for part in _parts(node)]
    return _size_of(value, sizes)


def _parts(container: object) -> Iterable[object]:
    return (
        chain(container.keys(), container.values())
        if isinstance(container, dict)
        else cast("list[object]", container)
    )


def _size_of(value: object, containers: Mapping[int, float]) -> float:
    return 1 + len(value) if isinstance(value, (str, bytes)) else containers.get(id(value), 1)


def describe(value: object) -> str:
    """A value of a pickle for messages: plain values shortened, containers by type. They may be huge once printed."""
    plain = value is None or isinstance(value, (str, bytes, int, float, Global))
    return f"{value!r:.40}" if plain else type(value).__name__


class _Bounded:
    """The methods of a file that pickletools calls, limited to :data:`MAX_BYTES` in all."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path, self.left = file, path, MAX_BYTES

    def read(self, nbytes: int) -> bytes:
        if nbytes > self.left:
            raise UnsafeInputError("pickle refused: too long", path=self.path, expected=f"at most {MAX_BYTES} bytes")
        self.left -= nbytes
        return self.file.read(nbytes)

    def readline(self) -> bytes:
        line = self.file.readline(min(self.left, 1 << 16))
        self.left -= len(line)
        return line


class _Mark:
    """The marker that MARK pushes on the stack; never a value."""


_MARK = _Mark()


class _Machine:
    """The pickle machine: a stack, a memo, and one method per kind of opcode."""

    def __init__(self, rules: Rules, path: str) -> None:
        self.rules, self.path = rules, path
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.result: object = None
        #: A class outside the rules, whose instance the next opcodes must build from attributes alone.
        self.pending: Global | None = None
        #: Attributes that may still be set: the same ones can be set again and again.
        self.attributes = MAX_OPCODES

    def step(self, name: str, argument: object) -> None:
        if self.pending is not None and name not in _MEMOS and name != "EMPTY_TUPLE":
            pending, self.pending = self.pending, None
            if name != "NEWOBJ":
                raise self.refused(pending)
        if name in _PUSHED:
            if isinstance(argument, int) and abs(argument) >= _MAX_INTEGER:
                raise RefusedError("an integer of more than 128 bits")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        else:
            raise UnsafeInputError(f"pickle refused: opcode {name}, which torch.save does not write", path=self.path)

    def pop(self) -> object:
        value = self.top()
        self.stack.pop()
        return value

    def top(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise RefusedError("a value is missing from the stack")
        return self.stack[-1]

    def drop(self) -> None:
        self.stack.pop()

    def drop_to_mark(self) -> None:
        self.pop_to_mark()

    def pop_to_mark(self) -> list[object]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        raise RefusedError("no mark on the stack")

    def pops(self, count: int) -> list[object]:
        return [self.pop() for _ in range(count)][::-1]

    def find(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError("a global whose name is not a string")
        found = Global(module, name)
        if not self.allowed(found):
            self.defer(found)
        self.stack.append(found)

    def allowed(self, found: Global) -> bool:
        """Whether the rules list a global."""
        return found in self.rules.calls or found in self.rules.values

    def defer(self, found: Global) -> None:
        """Allow a class outside the rules only if an instance without arguments follows: plain data."""
        if found.module.split(".")[0] in _NEVER_DATA:
            raise self.refused(found)
        self.pending = found

    def refused(self, found: Global) -> UnsafeInputError:
        """The error for a global that the rules do not allow."""
        return UnsafeInputError(
            f"refused global {found}, nothing executed",
            path=self.path,
            expected="tensors in plain dictionaries",
            found="a whole pickled model object" if _is_model_class(found) else None,
            hint=f"save the weights alone, {RESAVE}",
        )

    def recall(self, index: object) -> None:
        """Push a value of the memo; a class outside the rules only for another instance."""
        value = self.memo[cast("int", index)]
        if isinstance(value, Global) and not self.allowed(value):
            self.defer(value)
        self.stack.append(value)

    def new(self) -> None:
        """Build an instance: a call, or an empty object of a class outside the rules, to be given attributes."""
        function, arguments = self.pops(2)
        if isinstance(function, Global) and not self.allowed(function):
            if arguments != ():
                raise self.refused(function)
            self.stack.append(Attributes())
        else:
            self.stack += [function, arguments]
            self.call()

    def instance(self, module: str, name: str) -> None:
        """Build an object as protocol 0 does. torch.save never does."""
        self.find(module, name)
        raise RefusedError(f"an instance of {module}.{name}")

    def call(self) -> None:
        function, arguments = self.pops(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise RefusedError("a call of something that is not a global")
        if function not in self.rules.calls:
            raise RefusedError(f"a call of {function}")
        self.stack.append(self.rules.calls[function](arguments))

    def build(self) -> None:
        """Set attributes on an object. Those of dictionaries (``_metadata``) and placeholders are discarded."""
        state, target = self.pop(), self.top()
        if isinstance(target, Attributes) and isinstance(state, dict):
            self.attributes -= len(state)
            if self.attributes < 0:
                raise UnsafeInputError("pickle refused: too many attributes", path=self.path)
            if not _MODULE_ATTRIBUTES.isdisjoint(state):
                raise UnsafeInputError(
                    "file holds a whole pickled model object", path=self.path, hint=f"save the weights, {RESAVE}"
                )
            target.update(state)
        elif not isinstance(target, (dict, Opaque)):
            raise RefusedError("attributes set on something that is not a dictionary")

    def persistent(self) -> None:
        self.stack.append(self.rules.persistent(self.pop()))

    def extend(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise RefusedError("elements appended to something that is not a list")
        target.extend(values)

    def update(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, dict):
            raise RefusedError("items set on something that is not a dictionary")
        target.update(_pairs(values))

    def memoize(self, index: object) -> None:
        self.memo[cast("int", index)] = self.top()

    def stop(self) -> None:
        self.result = self.pop()


def _pairs(values: list[object]) -> dict[str | int | None, object]:
    """Key, value, key, value … → a dictionary. Keys must be scalars: hashing a deep tuple overflows the C stack."""
    if len(values) % 2:
        raise RefusedError("a dictionary key without a value")
    found: dict[str | int | None, object] = {}
    for key, value in zip(values[::2], values[1::2], strict=True):
        if key is not None and not isinstance(key, (str, int)):
            raise RefusedError(f"a dictionary key of type {type(key).__name__}")
        if isinstance(key, int) and abs(key) >= _MAX_KEY:
            raise RefusedError(f"a dictionary key of more than {_MAX_KEY.bit_length() - 1} bits")
        found[key] = value
    return found


def ordered_dict(arguments: tuple[object, ...]) -> dict[str | int | None, object]:
    """``collections.OrderedDict()``. Its items follow as separate opcodes, each counted."""
    if arguments:
        raise RefusedError("an ordered dictionary that is not built item by item")
    return {}


def _is_model_class(found: Global) -> bool:
    package = found.module.split(".")[0]
    return found.module.startswith("torch.nn.") or package in ("transformers", "pytorch_transformers", "__main__")


#: Opcodes that store the top of the stack in the memo.
_MEMOS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
#: Opcodes that push their argument.
_PUSHED = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8""".split()
)
_CONSTANTS: Mapping[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
    "MARK": lambda: _MARK,
}
_HANDLERS: Mapping[str, Callable[[_Machine, object], None]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "STOP": lambda m, _: m.stop(),
    "POP": lambda m, _: m.drop(),
    "POP_MARK": lambda m, _: m.drop_to_mark(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.pops(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.pops(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.pops(3))),
    "LIST": lambda m, _: m.stack.append(m.pop_to_mark()),
    "FROZENSET": lambda m, _: m.stack.append(m.pop_to_mark()),
    "DICT": lambda m, _: m.stack.append(_pairs(m.pop_to_mark())),
    "APPEND": lambda m, _: m.extend(m.pops(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.update(m.pops(2)),
    "SETITEMS": lambda m, _: m.update(m.pop_to_mark()),
    "PUT": lambda m, index: m.memoize(index),
    "BINPUT": lambda m, index: m.memoize(index),
    "LONG_BINPUT": lambda m, index: m.memoize(index),
    "MEMOIZE": lambda m, _: m.memoize(len(m.memo)),
    "GET": lambda m, index: m.recall(index),
    "BINGET": lambda m, index: m.recall(index),
    "LONG_BINGET": lambda m, index: m.recall(index),
    "GLOBAL": lambda m, words: m.find(*str(words).split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.find(*m.pops(2)),
    "INST": lambda m, words: m.instance(*str(words).split(" ", 1)),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.new(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persistent(),
}
