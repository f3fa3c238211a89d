"""Runs ONNX graphs of any exporter in onnxruntime on the CPU."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gptconvert.errors import GptConvertError, InputError, UnsupportedError, reason
from gptconvert.model.tensors import Array, LazyTensor
from gptconvert.publish.utf8_path import utf8_path
from gptconvert.targets.child.client import Limits
from gptconvert.targets.onnx.file import OnnxFile
from gptconvert.targets.onnx.process import OnnxProcess, RemoteSession
from gptconvert.targets.onnx.session import Settings, as_numbers, kind_of, open_session, ort_value
from gptconvert.verify.runners import Feeds, Outputs, RunError, one_line
from reference_model.config import INPUTS, OUTPUTS, GPTConfig

#: Names of a cache, in any exporter's style: a layer number, and ``key`` or ``value``.
LAYER = re.compile(r"\D*(\d+)\D*?(key|value)s?")
#: Largest unrequested keys and values that may be held, and largest graph that may be copied, in bytes.
MOST_CACHE, MOST_GRAPH = 64 << 20, 64 << 20
#: Optimisers that would hold every 16-bit weight in float32 once loaded.
HOLDING_FLOAT32 = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]


@dataclass(frozen=True)
class Binding:
    """The role of each graph input and output.

    Attributes:
        inputs: name → numpy type, for all inputs but the past.
        outputs: the task's output → its name in the graph.
        past: (key, value) input names per layer; empty without a cache.
        presents: (key, value) output names per layer; empty without a cache.
        cache_type: numpy type of keys and values.
        compute: computing type.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    past: tuple[tuple[str, str], ...]
    presents: tuple[tuple[str, str], ...]
    cache_type: str
    compute: str


def bind(file: OnnxFile, config: GPTConfig) -> Binding:
    """Match the inputs and outputs of any exporter's graph to their roles.

    Raises:
        UnsupportedError: unknown or missing inputs (all are listed), or a cache or outputs that do not fit the model.
    """
    inputs, outputs = file.inputs(), file.outputs()
    past, presents = _by_layer(inputs), _by_layer(outputs)
    known = (*INPUTS[config.task], "position_ids")
    unknown = [n for n in inputs if n not in known and not any(n in pair for pair in past)]
    missing = [n for n in INPUTS[config.task] if n not in inputs and n != "position_ids"]
    if unknown or missing:
        wrong = [f"unknown input {n}" for n in unknown] + [f"no input {n}" for n in missing]
        raise UnsupportedError(
            f"the graph cannot be fed: {', '.join(wrong)}",
            path=file.path,
            expected=", ".join(INPUTS[config.task]),
            found=", ".join(inputs),
        )
    if past and not len(past) == len(presents) == config.n_layer:
        raise UnsupportedError(
            "the graph's cache does not fit the model",
            path=file.path,
            expected=f"keys and values of {config.n_layer} layers in and out",
            found=f"{len(past)} in, {len(presents)} out",
        )
    rest = [n for n in outputs if not any(n in pair for pair in presents)]
    named = _task_outputs(file, config, rest)
    return Binding(
        inputs={n: _integer_type(file, inputs[n]) for n in known if n in inputs},
        outputs=named,
        past=past,
        presents=presents if past else (),
        cache_type=_float_type(file, inputs[past[0][0]]) if past else "float32",
        compute=_float_type(file, outputs[next(iter(named.values()))]),
    )


def _by_layer(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(key, value) names per layer, among the names that match :data:`LAYER`."""
    found: dict[int, dict[str, str]] = {}
    for name in values:
        match = LAYER.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = name
    complete = [found[i] for i in sorted(found)]
    return tuple((pair["key"], pair["value"]) for pair in complete if len(pair) == 2)


def _task_outputs(file: OnnxFile, config: GPTConfig, rest: list[str]) -> dict[str, str]:
    """The outputs other than the cache: matched by name, or the only one if the task has one."""
    required = OUTPUTS[config.task]
    if all(name in rest for name in required):
        return {name: name for name in required}
    if len(required) == len(rest) == 1:
        return {required[0]: rest[0]}
    expected, found = ", ".join(required), ", ".join(rest) or "none"
    raise UnsupportedError("the graph's outputs do not fit the task", path=file.path, expected=expected, found=found)


def element_type(value: Any) -> str:
    """``FLOAT``, ``INT64`` … of a ValueInfoProto."""
    import onnx

    name: str = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return name


def _integer_type(file: OnnxFile, value: Any) -> str:
    return _known_type(file, value, {"INT64": "int64", "INT32": "int32"})


def _float_type(file: OnnxFile, value: Any) -> str:
    return _known_type(file, value, {"FLOAT": "float32", "FLOAT16": "float16"})


def _known_type(file: OnnxFile, value: Any, known: Mapping[str, str]) -> str:
    name = element_type(value)
    if name in known:
        return known[name]
    expected = " or ".join(known.values())
    raise UnsupportedError(
        "unsupported element type", path=file.path, item=value.name, expected=expected, found=name.lower()
    )


class OnnxRunner:
    """onnxruntime on the CPU.

    Args:
        file: the checked file.
        binding: its inputs and outputs.
        prepack: whether weights are copied into the kernels' layout, and 16-bit ones into the computing type
            (onnxruntime's default). If not, they stay memory-mapped and are converted in use.
        optimise: whether graph optimisation runs (onnxruntime's default).
        taps: further values to return; only without optimisation, which may remove them.
        lent: weights stored in other files to use instead of the file's own, by name.
        threads: number of threads; 0 for one per core.
        most_cache: bytes of keys and values that are computed even if a run does not request them.
        tokens: largest number of tokens of a run, if more than the context; limits the memory of a confined process.
    """

    def __init__(
        self,
        file: OnnxFile,
        binding: Binding,
        config: GPTConfig,
        *,
        prepack: bool = False,
        optimise: bool = True,
        taps: Sequence[str] = (),
        lent: Mapping[str, LazyTensor] | None = None,
        threads: int = 0,
        most_cache: int = MOST_CACHE,
        tokens: int = 0,
    ) -> None:
        self.binding, self.config, self.taps = binding, config, tuple(taps)
        self.kv_cache, self.free_positions = bool(binding.past), "position_ids" in binding.inputs
        self.compute = binding.compute
        self._file, self._prepack, self._optimise, self._threads = file, prepack, optimise, threads
        self._lent = dict(lent or {})
        self._values: dict[str, Any] = {}  # a session does not keep them alive
        self._replaced: Mapping[str, Array] = {}
        self._base: OnnxRunner | None = None
        self._process = self._confined(max(tokens, config.n_ctx)) if file.confined else None
        self._session = self._open([*file.outputs(), *taps] if taps else None)
        self._without_cache: Any = None
        self._most_cache = most_cache

    def _confined(self, tokens: int) -> OnnxProcess:
        """A process for a graph of unknown origin; it ends with this object."""
        file = self._file
        process = OnnxProcess(Limits.of(file.path, file.weight_bytes, file.graph_bytes, self.config, tokens))
        weakref.finalize(self, process.close)
        return process

    def with_weights(self, arrays: Mapping[str, Array]) -> Self:
        """The same graph, in the same process, with other content for some of its tensors (name → array)."""
        other = copy.copy(self)
        other._base, other._lent, other._replaced, other._without_cache = self, {}, arrays, None
        other._values = {} if self._process else {name: _value(array) for name, array in arrays.items()}
        other._session = other._open([*self._file.outputs(), *self.taps])
        return other

    def close(self) -> None:
        """Free the memory of sessions in another process; the runner is not used after that."""
        for session in (self._session, self._without_cache):
            if isinstance(session, RemoteSession):
                session.close()

    def _open(self, outputs: Sequence[str] | None) -> Any:
        """A session on the file, or on its graph with other ``outputs``."""
        file, narrow = self._file, any(t.dtype.itemsize == 2 for t in self._file.initializers.values())
        settings = Settings(
            threads=self._threads,
            prepack=self._prepack,
            optimise=self._optimise,
            skipped=HOLDING_FLOAT32 if narrow and not self._prepack else (),
            buffers=self._buffers(),
        )
        as_it_is = outputs is None and not file.omitted and not file.inside
        content = None if as_it_is else _returning(file, outputs or list(file.outputs()), self._replaced)
        try:
            with utf8_path(file.path) as path:
                if self._process is not None:
                    return RemoteSession(self._process, path, content, settings, self._lent, self._replaced)
                if self._replaced:
                    return open_session(path, content, settings, {}, self._values)
                if not self._values:
                    self._values = {name: _value(tensor.read()) for name, tensor in self._lent.items()}
                return open_session(path, content, settings, self._values)
        except GptConvertError:
            raise
        except OSError as error:
            raise InputError(f"cannot be read ({reason(error)})", path=file.path) from error
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise InputError("onnxruntime cannot load the model", path=file.path, found=one_line(error)) from error

    def _buffers(self) -> list[tuple[str, str]]:
        """(past, present) names that share a buffer."""
        if not self._file.is_in_place:
            return []
        pairs = zip(self.binding.past, self.binding.presents, strict=True)
        return [(past, present) for inner, outer in pairs for past, present in zip(inner, outer, strict=True)]

    def run(self, feeds: Feeds, presents: bool) -> Outputs:
        """See :class:`Runner`."""
        names = [*self.binding.outputs.values()]
        if presents:
            names += [name for pair in self.binding.presents for name in pair]
        session = self._session if presents or self._small_cache(feeds) else self._session_without_cache()
        try:
            arrays = session.run([*names, *self.taps], self._inputs(feeds))
        except GptConvertError:
            raise
        except Exception as error:
            raise RunError(one_line(error)) from error
        named = dict(zip(self.binding.outputs, arrays, strict=False))
        cache = arrays[len(named) : len(names)]
        pairs = tuple(zip(cache[::2], cache[1::2], strict=True))
        return Outputs(named, pairs, dict(zip(self.taps, arrays[len(names) :], strict=True)))

    def _small_cache(self, feeds: Feeds) -> bool:
        """Whether to compute unrequested keys and values: they are small, or a second session would copy weights."""
        if self._file.is_in_place:
            return True  # the buffers exist anyway
        size = 2 * self.config.n_layer * feeds.attention_mask.size * self.config.n_embd * 4
        return size <= self._most_cache or self._prepack or self._file.model.ByteSize() > MOST_GRAPH

    def _session_without_cache(self) -> Any:
        """A session on the same graph without its keys and values as outputs.

        onnxruntime keeps every graph output until the end of a run, requested or not; other values only until their
        last use.
        """
        if self._without_cache is None:
            self._without_cache = self._open([*self.binding.outputs.values(), *self.taps])
        return self._without_cache

    def _inputs(self, feeds: Feeds) -> dict[str, Array]:
        named = {name: getattr(feeds, name).astype(kind) for name, kind in self.binding.inputs.items()}
        if self.config.task == "multiple-choice":
            named = {name: array[None] for name, array in named.items()}  # one question, B choices
        if self.kv_cache:
            empty = np.zeros((len(feeds.input_ids), self.config.n_head, 0, self.config.head_dim), np.float32)
            past = feeds.past or [(empty, empty)] * self.config.n_layer
            for names, arrays in zip(self.binding.past, past, strict=True):
                for name, array in zip(names, arrays, strict=True):
                    named[name] = array.astype(self.binding.cache_type, copy=False)
        return named


def _value(array: Array) -> Any:
    """onnxruntime's view of an array, without a copy."""
    return ort_value(as_numbers(array), kind_of(array.dtype))


def _returning(file: OnnxFile, names: Sequence[str], replaced: Mapping[str, Array]) -> bytes:
    """The serialised model with these values as outputs, without the attribute to omit; external data is not copied.

    Tensors in ``replaced``, initializers or constants, become external initializers of no file. The model is changed
    for the moment of writing, because a copy of one with its weights inside takes much memory.
    """
    import onnx

    if replaced:
        return _with_replaced(file, names, replaced)
    graph, have = file.model.graph, file.outputs()
    unknown = {n: onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names if n not in have}
    omitted = [(node, i) for node in graph.node for i, a in enumerate(node.attribute) if a.name == file.omitted]
    outputs, wanted = _copies(graph.output), _copies({**have, **unknown}[name] for name in dict.fromkeys(names))
    attributes = _copies(node.attribute[i] for node, i in omitted)
    try:
        _replace(graph.output, wanted)
        for node, i in omitted:
            del node.attribute[i]
        content: bytes = file.model.SerializeToString()
    finally:
        _replace(graph.output, outputs)
        for (node, i), attribute in zip(omitted, attributes, strict=True):
            node.attribute.insert(i, attribute)
    return content


def _copies(messages: Iterable[Any]) -> list[Any]:
    return [type(message).FromString(message.SerializeToString()) for message in messages]


def _replace(field: Any, values: Sequence[Any]) -> None:
    del field[:]
    field.extend(values)


def _with_replaced(file: OnnxFile, names: Sequence[str], replaced: Mapping[str, Array]) -> bytes:
    """:func:`_returning`, with tensors replaced."""
    import onnx

    have = file.outputs()
    model = _copied(file.model, ("graph",))
    graph = _copied(file.model.graph, ("output", "initializer", "node"))
    for name in dict.fromkeys(names):
        unknown = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        graph.output.append(have.get(name, unknown))
    graph.node.extend(node for node in file.model.graph.node if replaced.keys().isdisjoint(node.output))
    graph.initializer.extend(tensor for tensor in file.model.graph.initializer if tensor.name not in replaced)
    for name, array in replaced.items():
        tensor = graph.initializer.add(name=name, dims=array.shape, data_type=kind_of(array.dtype))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="replaced")
    model.graph.CopyFrom(graph)
    content: bytes = model.SerializeToString()
    return content


def _copied(message: Any, without: Sequence[str]) -> Any:
    """A copy of a protobuf message without some of its fields."""
    copied = type(message)()
    for field, value in message.ListFields():
        if field.name in without:
            continue
        if isinstance(value, str | bytes | int | float):
            setattr(copied, field.name, value)
        else:
            getattr(copied, field.name).MergeFrom(value)
    return copied
