"""Changed scalars as pairs of tensors in one safetensors file: `NAME.indices` and `NAME.values`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as files
from torch import Tensor, nn

from selectune import bits
from selectune.delta import Delta, inventory
from selectune.errors import DeltaError, DeltaFormatError
from selectune.files import read_owned
from selectune.interop.patches import changes, tell_fresh
from selectune.models.bases import LoadedModel
from selectune.models.restore import Source

FILE = "changed.safetensors"
INDICES, VALUES = ".indices", ".values"


def write_pairs(delta: Delta, loaded: LoadedModel, source: Source, folder: Path, dtype: Any = None) -> dict[str, Any]:
    """Writes `changed.safetensors`: int64 flat row-major places, rising, and the values that replace what is there.

    The header names the base, its digest and the delta's, and the seed of a head that no checkpoint holds. The file
    says nothing that the base would be checked by.
    """
    tensors, scalars = {}, 0
    for entry, flat, new, _ in changes(delta, loaded.model):
        tensors |= {f"{entry.name}{INDICES}": flat, f"{entry.name}{VALUES}": new}
        scalars += flat.numel()
    about = {"format": "pt", "base": source.model, "base_fingerprint": delta.info["base"]["fingerprint"]}
    told = tell_fresh("safetensors-diff", loaded)
    data = files.save(tensors, {**about, "delta": delta.digest, **({"seed": str(loaded.seed)} if told else {})})
    (folder / FILE).write_bytes(data)
    return {"scalars": scalars, "tensors": len(tensors) // 2, "bytes": len(data), **told}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model by all of their names; tied names share one object."""
    found = inventory(model)
    tensors = {entry.name: entry.tensor.detach() for entry in found.entries}
    return {name: tensors[entry.name] for name, entry in found.find.items()}


def read_pairs(path: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, the whole tensor with its changes) of each pair in a file; `model`: its base.

    The places may be int32 or int64 and stand in any order, each once. Raises DeltaFormatError for a file of anything
    else, DeltaError for pairs that do not fit the base.
    """
    path = path / FILE if path.is_dir() else path
    try:
        tensors = files.load(bytes(read_owned(path)))
    except SafetensorError as why:
        raise DeltaFormatError(f"{path} is no safetensors file: {why}") from why
    base = tensors_of(model)
    names = sorted({key.removesuffix(INDICES).removesuffix(VALUES) for key in tensors})
    for name in names:
        flat, values = tensors.get(name + INDICES), tensors.get(name + VALUES)
        if flat is None or values is None:
            raise DeltaFormatError(
                f'{path} has no pair "{name}{INDICES}" and "{name}{VALUES}"; it holds {len(tensors)} tensors'
            )
        yield name, replaced(name, base, flat, values)


def replaced(name: str, base: dict[str, Tensor], flat: Tensor, values: Tensor) -> Tensor:
    """A copy of a tensor of the base with `values` (n,) at flat places (n,); DeltaError if they do not fit it."""
    if name not in base:
        raise DeltaError(f'the base has no tensor "{name}"; it has {len(base)}, such as {", ".join(list(base)[:3])}')
    tensor = base[name].detach()
    flat = flat.reshape(-1)
    if flat.dtype not in (torch.int32, torch.int64) or flat.shape != values.shape or values.dtype != tensor.dtype:
        raise DeltaError(
            f'the change of "{name}" needs int32 or int64 places (n,) and values (n,) in {tensor.dtype}; got '
            f"{flat.dtype} {tuple(flat.shape)} and {values.dtype} {tuple(values.shape)}"
        )
    flat = flat.long()
    if flat.numel() and not (0 <= int(flat.min()) and int(flat.max()) < tensor.numel()):
        raise DeltaError(f'places of "{name}" lie outside its {tensor.numel()} entries; is this another base?')
    if flat.unique().numel() != flat.numel():
        raise DeltaError(f'a place of "{name}" occurs twice; its value would depend on the order of writing')
    new = tensor.clone(memory_format=torch.contiguous_format)
    bits.scatter(new, flat, values)
    return new
