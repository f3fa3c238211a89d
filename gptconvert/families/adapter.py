"""Merge a LoRA adapter into a base model's tensors, under the names and in the layout of the base's files.

The name table supplies what the adapter does not record: which modules store [in, out], and which tensors are the
embedding and its tied head. An adapter that changes only one of these two unties them, as in peft without merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families.family import Family
from gptconvert.model.assembly import row_of
from gptconvert.model.lora import Adapter, Merged, Shifted, Update
from gptconvert.model.resolution import find_prefix, head_prefix
from gptconvert.model.schemes import Row
from gptconvert.model.source import Source
from gptconvert.model.tensors import LazyTensor, Shape
from gptconvert.model.transforms import Transpose, cast

#: Components of a name that are compared with the adapter's lists.
MAX_COMPONENTS = 20


def merged(source: Source, family: Family) -> Source:
    """The source with its adapter merged lazily into its tensors and its configuration.

    Raises:
        InputError: tensors of the adapter are missing, unexpected or mis-shaped for this base; lists all of them.
        UnsupportedError: the adapter trained a tied embedding in a way that is not implemented.
    """
    adapter = source.adapter
    if adapter is None:
        return source
    merge = _Merge(source, family, adapter)
    merge.run()
    tensors = replace(
        source.tensors,
        tensors=merge.tensors,
        files=(*source.tensors.files, *adapter.stored.files),
        checksums=(*source.tensors.checksums, *adapter.stored.checksums),
        notes=(*source.tensors.notes, *adapter.stored.notes, *merge.notes),
    )
    return replace(source, tensors=tensors, config=merge.config)


@dataclass
class _Merge:
    """One merge: the base's tensors and configuration, changed step by step."""

    source: Source
    family: Family
    adapter: Adapter
    tensors: dict[str, LazyTensor] = field(init=False)
    config: dict[str, object] = field(init=False)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.scheme = self.family.scheme(self.source.scheme)
        self.tensors, self.config = dict(self.source.tensors), dict(self.source.config)
        self.prefix = find_prefix(self.scheme, self.tensors) or ""
        self.outer = head_prefix(self.scheme, self.prefix)
        heads = [row for row in self.scheme.rows if row.canonical == "lm_head.weight"]
        self.head_names = {name for row in heads for name in (*row.names, *row.aliases)}
        bodies = [row for row in self.scheme.rows if row.canonical == "wte.weight" and not row.head]
        self.embedding_name = bodies[0].names[0]

    def run(self) -> None:
        """Merge everything, or raise with all problems."""
        shared = self._apply_shared() if self._is_tied() else set[str]()
        for name, tensor in self.adapter.replaced.items():
            if name not in shared:
                self._replace(name, tensor)
        for module, update in self.adapter.updates.items():
            self._update(module, update)
        self._require_targets()
        if self.problems:
            raise InputError(
                "\n".join(["the adapter does not fit this base model", *sorted(self.problems)]),
                path=self.adapter.path,
                hint=f"the adapter was trained on {self.adapter.base}" if self.adapter.base else None,
            )

    # A tied head -----------------------------------------------------------------------------------------------

    def _is_tied(self) -> bool:
        return bool(self.family.keys.read(self.config, self.source.config_path).values["tied_head"])

    def _apply_shared(self) -> set[str]:
        """Replace the matrix shared by embedding and head, and untie the two if the adapter changes one alone.

        Returns:
            the names of the tensors applied, in the adapter.
        """
        embedding = self._located(self.embedding_name)
        if embedding is None:
            return set()  # resolving the name table reports it
        of_either = [name for name in self.adapter.replaced if self._is_shared(name)]
        shared = {name for name in of_either if not self._is_copy(name)}
        for name in sorted(shared):
            tensor = self.adapter.replaced[name]
            self._resize(embedding, tensor)
            self.tensors[embedding] = cast(tensor, self.tensors[embedding].dtype)
            self.touched.add(embedding)
        if shared:  # a second copy in the base's files would be stale
            for copy in {self.outer + name for name in self.head_names} - {embedding}:
                self.tensors.pop(copy, None)
        updated = [f"{module}.weight" for module in self.adapter.updates if self._is_shared(f"{module}.weight")]
        alone = [*updated, *(name for name in of_either if name not in shared)]
        if alone and self.adapter.keeps_tying:
            raise UnsupportedError(
                "training a tied embedding and head together (ensure_weight_tying) is not implemented",
                path=self.adapter.config_path,
                item=alone[0],
                hint="merge it with peft's model.merge_and_unload(), save the result and convert that",
            )
        if alone:
            self._untie(embedding, {self._bare(name) for name in alone})
        return shared

    def _untie(self, embedding: str, changed: set[str]) -> None:
        """Give the head a tensor of its own, equal to the embedding so far."""
        shared = self.tensors.pop(embedding)
        self.tensors[self.prefix + self.embedding_name] = shared
        head = next(row for row in self.scheme.rows if row.canonical == "lm_head.weight").names[0]
        self.tensors[self.outer + head] = shared
        self.config["tie_word_embeddings"] = False
        self.notes.append(
            f"the adapter changes {' and '.join(sorted(changed))} alone: embedding and head, tied in the base, "
            "became two tensors"
        )

    def _is_shared(self, name: str) -> bool:
        """Whether a parameter is the embedding or the language-model head."""
        return self._bare(name) == self.embedding_name or self._bare(name) in self.head_names

    def _is_copy(self, name: str) -> bool:
        """Whether the adapter trained this parameter in a copy of its own (``modules_to_save``)."""
        return any(name.removesuffix(".weight").endswith(end) for end in self.adapter.saved)

    # One tensor ------------------------------------------------------------------------------------------------

    def _replace(self, name: str, tensor: LazyTensor) -> None:
        target = self._located(name)
        if target is None:
            self._add_head(name, tensor)
            return
        if self._bare(name) == self.embedding_name:
            self._resize(target, tensor)
        elif tensor.shape != self.tensors[target].shape and self._bare(name) not in self.head_names:
            self._wrong_shape(name, self.tensors[target].shape, tensor.shape)
        self.touched.add(target)
        self.tensors[target] = cast(tensor, self.tensors[target].dtype)

    def _add_head(self, name: str, tensor: LazyTensor) -> None:
        """Add a tensor of a head that the base lacks. Its task takes precedence over the base's architecture."""
        row = row_of(self.scheme, self._bare(name))
        if row is None or not row.head:
            self.problems.append(f"  unexpected  {name}: the base model has no such tensor")
            return
        added = self.outer + self._bare(name)
        self.tensors[added] = tensor
        self.touched.add(added)
        if self._bare(name) not in self.head_names:
            self.config.pop("architectures", None)

    def _update(self, module: str, update: Update) -> None:
        name = f"{module}.weight"
        target = self._located(name)
        row = row_of(self.scheme, self._bare(name))
        if target is None or len(self.tensors[target].shape) != 2:
            self.problems.append(f"  unexpected  LoRA tensors of {module}: the base model has no such linear layer")
            return
        transposed = update.embedding or (row is not None and _stored_by_input(row))
        base = self.tensors[target]
        outputs, inputs = base.shape[::-1] if transposed else base.shape
        rank = update.a.shape[0] if update.a.shape else 0
        expected: Mapping[str, tuple[LazyTensor | None, Shape]] = {
            "lora_A": (update.a, (rank, inputs)),
            "lora_B": (update.b, (outputs, rank)),
            "lora_magnitude_vector": (update.magnitude, (outputs,)),
            "lora_B.bias": (update.bias, (outputs,)),
        }
        wrong = {part: pair for part, pair in expected.items() if pair[0] is not None and pair[0].shape != pair[1]}
        for part, (tensor, shape) in wrong.items():
            self._wrong_shape(f"{module}.{part}", shape, tensor.shape if tensor else ())
        if wrong:
            return
        self.touched.add(target)
        self.tensors[target] = Merged(base, update, transposed)
        if update.bias is not None:
            self._shift(f"{module}.bias", update.bias, update.scale)

    def _shift(self, name: str, addend: LazyTensor, scale: float) -> None:
        target = self._located(name)
        if target is None:
            self.problems.append(f"  unexpected  {name}: the adapter adds a bias, and the base model has none here")
        else:
            self.tensors[target] = Shifted(self.tensors[target], addend, scale)

    def _resize(self, embedding: str, tensor: LazyTensor) -> None:
        """Adopt the number of rows of an embedding that the adapter resized."""
        before, after = self.tensors[embedding].shape, tensor.shape
        if len(after) != 2 or after[1:] != before[1:]:
            self._wrong_shape(self.embedding_name, before, after)
        elif after != before:
            self.config["vocab_size"] = after[0]
            self.notes.append(f"the adapter resized the vocabulary from {before[0]} to {after[0]} ids")

    def _wrong_shape(self, name: str, expected: Shape, found: Shape) -> None:
        self.problems.append(f"  wrong shape {name}: expected {list(expected)}, found {list(found)}")

    # Names -----------------------------------------------------------------------------------------------------

    def _bare(self, name: str) -> str:
        """A name without the prefixes of the file and of transformers' models."""
        for prefix in filter(None, (self.prefix, self.scheme.body, self.outer)):
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        return name

    def _located(self, name: str) -> str | None:
        """The name in the base's files; None if they lack the tensor."""
        bare = self._bare(name)
        aliases = self.head_names if bare in self.head_names else set[str]()
        if bare == self.embedding_name:
            aliases = {alias for row in self.scheme.rows if bare in row.names for alias in row.aliases}
        names = (prefix + each for each in (bare, *sorted(aliases)) for prefix in (self.prefix, self.outer))
        return next((each for each in names if each in self.tensors), None)

    def _require_targets(self) -> None:
        """Find modules of the base that the adapter should have trained, but that its file lacks."""
        weights = {n: t for n, t in self.tensors.items() if n.endswith(".weight") and len(t.shape) == 2}
        left = [self._bare(name).removesuffix(".weight") for name in weights if name not in self.touched]
        for what, ends in (("LoRA tensors of", self.adapter.targets), ("trained weight of", self.adapter.saved)):
            wanted = frozenset(ends)
            self.problems += [f"  missing     {what} {m}" for m in left if not wanted.isdisjoint(_endings(m))]


def _endings(module: str) -> list[str]:
    """A module's name and its last components: ``h.0.attn`` → ``h.0.attn``, ``0.attn``, ``attn``."""
    parts = module.split(".")[-MAX_COMPONENTS:]
    return [".".join(parts[i:]) for i in range(len(parts))]


def _stored_by_input(row: Row) -> bool:
    """Whether the file stores this linear weight [in, out]."""
    return any(isinstance(step, Transpose) for step in row.steps)
