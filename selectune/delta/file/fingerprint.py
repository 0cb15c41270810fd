"""What a model is, in digests: its structure, and the bits of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectune.bits import dtype_name, raw
from selectune.delta.file.schema import WRAPPERS, canonical_json, canonical_name, sha256
from selectune.errors import BaseMismatchError, DeltaStateError

OWN = "selectune_"
"""How the parameters that an attached tuner puts on a model are named; they are no part of its structure."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of a model, under the first of its names."""

    name: str
    kind: str  # "parameter" or "buffer"
    tensor: Tensor
    names: tuple[str, ...]  # every canonical name of the tensor: more than one where weights are tied


@dataclass(frozen=True, eq=False)
class Inventory:
    """The parameters and persistent buffers of a model, each tensor once, in the model's order."""

    entries: tuple[Entry, ...]
    find: dict[str, Entry]  # by every canonical name
    attached: bool  # whether a tuner is attached


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP, torch.compile, FSDP and checkpoint wrappers, which stands for all of them."""
    while len(model._modules) == 1 and not model._parameters and not model._buffers:
        name, inner = next(iter(model._modules.items()))
        if name not in WRAPPERS or inner is None:
            break
        model = inner
    return model


def inventory(model: nn.Module) -> Inventory:
    """List a model's parameters and persistent buffers by canonical name; tied tensors are one entry.

    Raises DeltaStateError for tensors without data here (meta, sharded) and BaseMismatchError where two
    different tensors get the same canonical name.
    """
    groups: dict[Any, list[str]] = {}
    tensors: dict[Any, tuple[str, Tensor]] = {}
    attached = False
    for name, kind, tensor in _walk(model):
        if name.rpartition(".")[2].startswith(OWN):
            attached = True
            continue
        _check_tensor(name, tensor)
        key = _identity(kind, tensor)
        tensors.setdefault(key, (kind, tensor))
        group = groups.setdefault(key, [])
        if canonical_name(name) not in group:
            group.append(canonical_name(name))
    entries, find = [], {}
    for key, names in groups.items():
        kind, tensor = tensors[key]
        entry = Entry(names[0], kind, tensor, tuple(names))
        entries.append(entry)
        for name in names:
            if name in find:
                raise BaseMismatchError(
                    f'two tensors of the model have the same canonical name "{name}": once the components '
                    f"that DDP, torch.compile, FSDP and checkpointing add are left out, names must differ"
                )
            find[name] = entry
    return Inventory(tuple(entries), find, attached)


def _walk(model: nn.Module) -> Iterable[tuple[str, str, Tensor]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, "parameter", parameter
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, "buffer", buffer


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise DeltaStateError(f'"{name}" is on the meta device and has no values; load the model first')
    if hasattr(tensor, "full_tensor"):
        raise DeltaStateError(f'"{name}" is sharded over several ranks; deltas need whole tensors')


def _identity(kind: str, tensor: Tensor) -> Any:
    # tied weights may be two Parameters over one memory, so the memory decides, not the object
    if tensor.numel() == 0 or tensor.layout is not torch.strided:
        return (kind, id(tensor))
    return (kind, tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def digest_bits(tensor: Tensor) -> str:
    """16 hex digits of sha256 over dtype, shape and raw little-endian bits: one read of the tensor.

    >>> digest_bits(torch.tensor([0.0])) == digest_bits(torch.tensor([-0.0]))
    False
    """
    shape = ",".join(str(size) for size in tensor.shape)
    found = hashlib.sha256(f"{dtype_name(tensor.dtype)}[{shape}]".encode("ascii"))
    found.update(raw(tensor).data)
    return found.hexdigest()[:16]


def structure_digest(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes, ties of all parameters and persistent buffers; reads no weight."""
    return _structure(inventory(model))


def _structure(found: Inventory) -> str:
    rows = [
        [name, entry.kind, list(entry.tensor.shape), dtype_name(entry.tensor.dtype), min(entry.names)]
        for name, entry in found.find.items()
    ]
    return sha256(canonical_json(sorted(rows, key=lambda row: row[0])))


def weights_digest(model: nn.Module, without: Iterable[str] = ()) -> str:
    """sha256 over every parameter and persistent buffer of the model but those named: one read of all weights."""
    return _weights(inventory(model), without)


def _weights(found: Inventory, without: Iterable[str] = ()) -> str:
    return all_digests(found, _digests(found), without)


def _digests(found: Inventory) -> dict[str, str]:
    return {entry.name: digest_bits(entry.tensor) for entry in found.entries}


def all_digests(found: Inventory, digests: Mapping[str, str], without: Iterable[str] = ()) -> str:
    """sha256 over the digests of a model's tensors, those named left out under all of their names."""
    out = {found.find[name].name for name in without if name in found.find}
    rows = sorted([name, digests[entry.name]] for name, entry in found.find.items() if entry.name not in out)
    return sha256(canonical_json(rows))


def is_weights(found: Inventory, base: Mapping[str, Any]) -> bool:
    """Whether the model has the weights that `info["base"]` has the digest of: one read of them.

    Those in `initialised` are left out, as they have digests of their own; older files are over all tensors.
    """
    digests, fresh = _digests(found), [row["name"] for row in base["initialised"]]
    return base["weights"] in (all_digests(found, digests, fresh), all_digests(found, digests))


def never_loaded(found: Inventory) -> list[str]:
    """Names of the parameters that transformers found in no checkpoint: those without the mark of what it loads.

    Empty where no parameter has the mark: the model came by another way, or is a copy, which has lost the marks.
    """
    parameters = [entry for entry in found.entries if entry.kind == "parameter"]
    fresh = [entry.name for entry in parameters if not getattr(entry.tensor, "_is_hf_initialized", False)]
    return fresh if len(fresh) < len(parameters) else []


def delta_fingerprint(structure: str, patches: Iterable[Any], dense: Iterable[Any]) -> str:
    """sha256 over the base's structure and its values wherever the delta writes."""
    rows = [[[part.name, part.base_digest] for part in parts] for parts in (patches, dense)]
    return sha256(canonical_json([structure, *rows]))
