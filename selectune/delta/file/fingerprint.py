"""What a model is, in digests: its structure, and the bits of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from selectune.beside import side_of
from selectune.bits import dtype_name, raw
from selectune.delta.file.adapter_record import AdapterRecord, adapter_of, is_marked
from selectune.delta.file.schema import WRAPPERS, canonical_json, canonical_name, sha256
from selectune.errors import BaseMismatchError, DeltaStateError
from selectune.internals import is_sharded
from selectune.quantised import Quantised, quantised_weights

OWN = "selectune_"
"""The last component of a parameter that an attached tuner adds begins so; it is no part of the model's structure."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of a model, under the first of its names."""

    name: str
    kind: str  # "parameter" or "buffer"
    tensor: Tensor  # of a quantised weight, the values beside it (`SideValues`), which are 0 in the base
    names: tuple[str, ...]  # every canonical name of the tensor: more than one where weights are tied
    quantised: Quantised | None = None

    @property
    def form(self) -> str:
        """The dtype, or the kind of quantisation with its settings."""
        return dtype_name(self.tensor.dtype) if self.quantised is None else self.quantised.stored.kind

    def digest(self) -> str:
        """16 hex digits over all bits: those stored for a quantised weight, and any values beside it."""
        if self.quantised is None:
            return digest_bits(self.tensor)
        flat, values = side_of(self.quantised).held
        beside = f"{digest_bits(flat)}{digest_bits(values)}" if flat.numel() else ""
        return sha256(self.quantised.digest() + beside)[:16] if beside else self.quantised.digest()


@dataclass(frozen=True, eq=False)
class Inventory:
    """The parameters and persistent buffers of a model, each tensor once, in the model's order."""

    entries: tuple[Entry, ...]
    find: dict[str, Entry]  # by every canonical name
    attached: bool  # whether a tuner is attached
    adapter: AdapterRecord | None  # the adapter that is on record for the model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP, torch.compile, FSDP and activation checkpointing."""
    while len(model._modules) == 1 and not model._parameters and not model._buffers:
        name, inner = next(iter(model._modules.items()))
        if name not in WRAPPERS or inner is None:
            break
        model = inner
    return model


def inventory(model: nn.Module, sharded: bool = False) -> Inventory:
    """List a model's parameters and persistent buffers by canonical name; tied tensors are one entry.

    `sharded`: tensors may be sharded; only `digest_bits` reads these. Raises DeltaStateError for tensors without data
    here (meta, sharded) and BaseMismatchError where two different tensors get the same canonical name.
    """
    packed = quantised_weights(model)
    groups: dict[Any, list[str]] = {}
    tensors: dict[Any, tuple[str, Tensor]] = {}
    attached = False
    for name, kind, tensor in _walk(model):
        if name.rpartition(".")[2].startswith(OWN):
            attached = True
            continue
        _check_tensor(name, tensor, sharded)
        key = _identity(kind, tensor)
        tensors.setdefault(key, (kind, tensor))
        group = groups.setdefault(key, [])
        if canonical_name(name) not in group:
            group.append(canonical_name(name))
    entries, find = [], {}
    for key, names in groups.items():
        kind, tensor = tensors[key]
        quantised = packed.get(id(tensor))
        if quantised is not None:
            tensor = cast(Tensor, side_of(quantised))
        entry = Entry(names[0], kind, tensor, tuple(names), quantised)
        entries.append(entry)
        for name in names:
            if name in find:
                raise BaseMismatchError(
                    f'two tensors of the model have the same canonical name "{name}": once the components '
                    f"that DDP, torch.compile, FSDP and checkpointing add are left out, names must differ"
                )
            find[name] = entry
    return Inventory(tuple(entries), find, attached, adapter_of(unwrapped(model)))


def _walk(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, kind, tensor in own_tensors(module):
            yield f"{prefix}.{name}" if prefix else name, kind, tensor


def own_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(name, "parameter" or "buffer", tensor) of a module itself, without its children and non-persistent buffers."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, "parameter", parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, "buffer", buffer


def _check_tensor(name: str, tensor: Tensor, sharded: bool) -> None:
    if tensor.is_meta:
        raise DeltaStateError(f'"{name}" is on the meta device and has no values; load the model first')
    if is_sharded(tensor) and not sharded:
        raise DeltaStateError(f'"{name}" is sharded over several ranks; deltas need whole tensors')


def _identity(kind: str, tensor: Tensor) -> Any:
    # tied weights may be two Parameters over one memory, so the memory decides, not the object
    if tensor.numel() == 0 or tensor.layout is not torch.strided or is_sharded(tensor) or tensor.data_ptr() == 0:
        return (kind, id(tensor))
    return (kind, tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def digest_bits(tensor: Tensor) -> str:
    """16 hex digits of sha256 over dtype, shape and raw little-endian bits: one read of the tensor.

    A sharded tensor is gathered, so all ranks ask together.

    >>> digest_bits(torch.tensor([0.0])) == digest_bits(torch.tensor([-0.0]))
    False
    """
    if is_sharded(tensor):
        tensor = cast(Any, tensor).full_tensor()
    shape = ",".join(str(size) for size in tensor.shape)
    found = hashlib.sha256(f"{dtype_name(tensor.dtype)}[{shape}]".encode("ascii"))
    found.update(raw(tensor).data)
    return found.hexdigest()[:16]


def structure_digest(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes, ties of all parameters and persistent buffers; reads no weight."""
    return structure_of(inventory(model))


def structure_of(found: Inventory) -> str:
    """`structure_digest` of a model whose tensors are listed already."""
    rows = [
        [name, entry.kind, list(entry.tensor.shape), entry.form, min(entry.names)] for name, entry in found.find.items()
    ]
    return sha256(canonical_json(sorted(rows, key=lambda row: row[0])))


def weights_digest(model: nn.Module, without: Iterable[str] = ()) -> str:
    """sha256 over every parameter and persistent buffer of the model but those named: one read of all weights."""
    return weights_of(inventory(model), without)


def weights_of(found: Inventory, without: Iterable[str] = ()) -> str:
    """`weights_digest` of a model whose tensors are listed already."""
    return all_digests(found, _digests(found), without)


def adapter_digest(found: Inventory, markers: Iterable[str], digest: Callable[[Entry], str] = Entry.digest) -> str:
    """sha256 over names and bits of an adapter's tensors: one read of them."""
    markers = set(markers)
    rows = [[name, digest(entry)] for name, entry in found.find.items() if is_marked(name, markers)]
    return sha256(canonical_json(sorted(rows)))


def _digests(found: Inventory) -> dict[str, str]:
    return {entry.name: entry.digest() for entry in found.entries}


def all_digests(found: Inventory, digests: Mapping[str, str], without: Iterable[str] = ()) -> str:
    """sha256 over the digests of a model's tensors, those named left out under all of their names."""
    out = {found.find[name].name for name in without if name in found.find}
    rows = sorted([name, digests[entry.name]] for name, entry in found.find.items() if entry.name not in out)
    return sha256(canonical_json(rows))


def is_weights(found: Inventory, base: Mapping[str, Any]) -> bool:
    """Whether the model's weights have the digest that `info["base"]` records: one read of them.

    The digest leaves out the tensors in `initialised`, which have digests of their own. In older files it is over all.
    """
    digests, fresh = _digests(found), [row["name"] for row in base["initialised"]]
    return base["weights"] in (all_digests(found, digests, fresh), all_digests(found, digests))


def never_loaded(found: Inventory) -> list[str]:
    """Names of the parameters that transformers found in no checkpoint: they lack the mark that it puts on the others.

    The list is empty if no parameter has the mark: transformers did not load the model, or it is a copy without marks.
    """
    parameters = [entry for entry in found.entries if entry.kind == "parameter" and entry.quantised is None]
    fresh = [entry.name for entry in parameters if not getattr(entry.tensor, "_is_hf_initialized", False)]
    return fresh if len(fresh) < len(parameters) else []


def delta_fingerprint(structure: str, patches: Iterable[Any], dense: Iterable[Any]) -> str:
    """sha256 over the base's structure and its values wherever the delta writes."""
    rows = [[[part.name, part.base_digest] for part in parts] for parts in (patches, dense)]
    return sha256(canonical_json([structure, *rows]))
