"""Malicious pickles: no code runs, the process survives, and each error names the opcode or global refused."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptconvert.containers.torch import read_torch
from gptconvert.errors import InputError, UnsafeInputError
from tests.containers.torch_files import zip_of
from tests.helpers import ROOT

# Malicious files. No code in them may run: each would create the file ``ran``.


class Attack:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def attacks(ran: str) -> dict[str, bytes]:
    command = f"touch {ran}"
    call = f"cposix\nsystem\n(X{{}}{command}tR.".encode()
    sized = call.replace(b"{}", struct.pack("<I", len(command)))
    weights = OrderedDict(a=1)
    return {
        **{f"os.system, protocol {p}": pickle.dumps({"a": Attack(os.system, command)}, p) for p in range(6)},
        "eval": pickle.dumps(Attack(eval, f"open({ran!r}, 'w')")),
        "exec": pickle.dumps(Attack(exec, f"open({ran!r}, 'w')")),
        "subprocess": pickle.dumps(Attack(subprocess.call, ["touch", ran])),
        "getattr": pickle.dumps(Attack(getattr, weights, "clear")),
        "in a persistent id": b"\x80\x02" + sized[:-1] + b"Q.",
        "as a dictionary key": b"\x80\x02}" + sized[:-1] + b"K\x01s.",
        "by instance": f"\x80\x02(S'{command}'\nios\nsystem\n.".encode("latin-1"),
        "by object": b"\x80\x02(cposix\nsystem\nX" + struct.pack("<I", len(command)) + command.encode() + b"o.",
        "by newobj": sized.replace(b"R.", b"\x81."),
        "by stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R.",
        "by extension": b"\x80\x02\x82\x01.",
        "torch.load inside": b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x01x\x85R.",
        "attributes of an allowed class": b"\x80\x02ccollections\nOrderedDict\n}X\x01\0\0\0xK\x01sb.",
        "call of a storage class": b"\x80\x02ctorch\nFloatStorage\nK\x01\x85R.",
        "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
    }


NAMES = tuple(attacks("x"))
#: These stay within the allow-list, so they are damaged rather than unsafe.
HARMLESS = ("attributes of an allowed class", "call of a storage class")


@pytest.mark.parametrize("container", ["zip", "bare", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_23_no_code_runs(tmp_path: Path, name: str, container: str) -> None:
    ran = tmp_path / "ran"
    data = attacks(str(ran))[name]
    path = tmp_path / "pytorch_model.bin"
    if container == "zip":
        zip_of(path, data)
    elif container == "bare":
        path.write_bytes(data)
    else:
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        path.write_bytes(head + data)
    with pytest.raises((UnsafeInputError, InputError)) as caught:
        read_torch(path)
    assert not ran.exists()
    if container == "bare" and not data.startswith(b"\x80"):
        assert "written by torch.save" in str(caught.value)  # protocols 0 and 1: never parsed as a pickle
        return
    assert type(caught.value) is (InputError if name in HARMLESS else UnsafeInputError)
    if name.startswith("os.system"):
        assert "refused global posix.system, nothing executed" in str(caught.value)


@pytest.mark.parametrize("module", ["torch", "torch._utils", "numpy", "collections", "builtins", "torch.storage"])
def test_23_only_listed_names_of_a_module(tmp_path: Path, module: str) -> None:
    """A global that is only mentioned, never called, is refused as well."""
    data = f"\x80\x02c{module}\nload\n.".encode("latin-1")
    with pytest.raises(UnsafeInputError, match=rf"refused global {module}\.load, nothing executed"):
        read_torch(zip_of(tmp_path / "x.bin", data))


def test_23_the_attack_is_real(tmp_path: Path) -> None:
    """Python's unpickler runs it, so the test above can fail."""
    pickle.loads(attacks(str(tmp_path / "ran"))["os.system, protocol 2"])
    assert (tmp_path / "ran").exists()


TOO_LONG = "UnsafeInputError", "pickle refused: too long"
TOO_LARGE = "UnsafeInputError", "it contains itself, or the same large part very often"
#: Lists made empty, each put twice into the one before: their sizes are known only at the end.
FILLED_LATER = (
    b"".join(b"]q%c" % i for i in range(60))
    + b"".join(b"h%c(h%ch%ce" % (i, i + 1, i + 1) for i in range(59))
    + b"h\x00"
)
#: A tensor whose size contains a tuple that doubles.
SIZE_OF_DOUBLED = (
    b"\x80\x02]" + b"q\x00h\x00h\x00\x86" * 60 + b"q\x01"
    b"0ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x01tQK\x00h\x01\x85K\x01\x85NNtR."
)
#: The same attributes, set on one object again and again.
SET_OFTEN = (
    b"\x80\x02cargparse\nNamespace\n)\x81}("
    + b"".join(b"J%sN" % struct.pack("<i", i) for i in range(20_000))
    + b"uq\x000"
    + b"h\x00b" * 100
    + b"."
)


def colliding(count: int) -> bytes:
    """A dictionary whose keys all have the hash 0: multiples of 2^61 - 1."""
    keys = (((1 << 61) - 1) * i for i in range(1, count))
    return b"\x80\x02}(" + b"".join(b"\x8a\x0a" + key.to_bytes(10, "little") + b"N" for key in keys) + b"u."


NO_KEY = "InputError", "a dictionary key of type tuple"
NO_VALUE = "InputError", "a value is missing"
NO_TENSORS = "InputError", "no named tensors"
#: name → (pickle, (error class, part of the message)).
BOMBS: dict[str, tuple[bytes, tuple[str, str]]] = {
    "memo index 2^32": (b"\x80\x02]r\xff\xff\xff\xff.", NO_TENSORS),
    "bytes of 2^62": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.", TOO_LONG),
    "text of 2^31": (b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"x.", TOO_LONG),
    "bytearray of 2^40": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", TOO_LONG),
    "frame of 2^63": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 63) + b".", NO_VALUE),
    "deep tuple as key": (b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.", NO_KEY),
    "deep list": (b"\x80\x02" + b"]" * 250_000 + b"a" * 249_999 + b".", NO_TENSORS),
    "deep tuple": (b"\x80\x02N" + b"\x85" * 590_000 + b".", NO_TENSORS),
    "huge whole number": (
        b"\x80\x02\x8b" + struct.pack("<i", 4 << 20) + b"\x7f" * (4 << 20) + b".",
        ("InputError", "more than 128 bits"),
    ),
    "three million opcodes": (b"\x80\x02" + b"N0" * 1_500_000 + b"N.", TOO_LONG),
    "list in itself": (b"\x80\x02]" + b"2a2a" * 100_000 + b".", TOO_LARGE),
    "doubling": (b"\x80\x02]" + b"q\x00h\x00h\x00\x86" * 60 + b".", TOO_LARGE),
    "doubling, from the outside in": (b"\x80\x02" + FILLED_LATER + b".", TOO_LARGE),
    "doubling in a size": (SIZE_OF_DOUBLED, ("InputError", "a tensor of offset 0, size (tuple)")),
    "one long text, often": (
        b"\x80\x02X\x00\x00\x10\x00" + b"x" * (1 << 20) + b"q\x000](" + b"h\x00" * 80 + b"e.",
        TOO_LARGE,
    ),
    "keys of one hash": (colliding(60_000), ("InputError", "a dictionary key of more than 60 bits")),
    "attributes, set often": (SET_OFTEN, ("UnsafeInputError", "too many attributes")),
    "one size, fifty thousand times": (
        b"\x80\x02](K\x01" + b"2" * 200_000 + b"tq\x000ctorch\nSize\nq\x010" + b"h\x01h\x00\x85R0" * 50_000 + b".",
        NO_TENSORS,
    ),
    "no stop": (b"\x80\x02]]]]", ("InputError", "exhausted")),
    "mark as value": (b"\x80\x02(\x85.", NO_VALUE),
    "memo not set": (b"\x80\x02h\x07.", ("InputError", "damaged")),
    "empty stack": (b"\x80\x02.", NO_VALUE),
    "nothing": (b"\x80\x02", ("InputError", "exhausted")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little(tmp_path: Path, name: str) -> None:
    """Each runs in its own process, limited to 1 GiB of address space and ten seconds of processor time."""
    path = zip_of(tmp_path / "x.bin", BOMBS[name][0], **{"data/0": bytes(4)})
    code = (
        "import resource, sys\n"
        "from gptconvert.errors import GptConvertError\n"
        "from gptconvert.containers.torch import read_torch\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (10, 10))\n"
        "try: read_torch(sys.argv[1])\n"
        "except GptConvertError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    kind, words = BOMBS[name][1]
    assert done.stdout.startswith(kind + " ")
    assert words in done.stdout
