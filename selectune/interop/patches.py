"""Changed scalars in the shape of vLLM's sparse weight transfer: name, int32 places, new values, full shape."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as files
from torch import Tensor, nn

from selectune import bits
from selectune.bits import FLOATS, dtype_name, int_view, raw, same_bits
from selectune.delta import Delta, canonical_name, inventory
from selectune.delta.file.fingerprint import Entry
from selectune.errors import BaseMismatchError, DeltaError, DeltaFormatError, NonFiniteError, some
from selectune.files.reading import NotPlain, plain, short
from selectune.models.bases import LoadedModel, resolve
from selectune.models.restore import Source

log = logging.getLogger("selectune")

MOST = 2**31 - 1
"""The last place that an int32 can name."""
HEADER = "selectune_update"


@dataclass(frozen=True, eq=False)
class WeightPatch:
    """New values of some entries of one tensor, with the fields of vLLM's `SparseWeightPatch`.

    `indices` (n,) int32 are flat row-major places, strictly rising; `values` (n,) replace what is there.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class WeightUpdate:
    """Patches that turn version `base` of a model's weights into version `target`, and those of the way back.

    A version is a string that both sides know. `digest` is sha256 over both versions and all patches.
    """

    base: str
    target: str
    patches: tuple[WeightPatch, ...]
    before: tuple[WeightPatch, ...]

    @property
    def digest(self) -> str:
        found = hashlib.sha256(json.dumps([self.base, self.target]).encode())
        found.update(content_digest(self.patches).encode())
        return found.hexdigest()

    @property
    def scalars(self) -> int:
        """Number of values in all patches."""
        return sum(patch.indices.numel() for patch in self.patches)

    def reverse(self) -> WeightUpdate:
        """The update that leads back: from `target` to `base`, with the values that stood there, bit for bit."""
        return WeightUpdate(self.target, self.base, self.before, self.patches)

    def to_bytes(self) -> bytes:
        """A safetensors file: `N.indices` and `N.values` of patch N, and in its header the names, shapes and versions.

        The header's `names`, `dtype_names`, `shapes` and `num_updates_list` are the fields that vLLM sends ahead.
        """
        told = {
            "base": self.base,
            "target": self.target,
            "digest": self.digest,
            "names": [patch.name for patch in self.patches],
            "dtype_names": [str(patch.values.dtype).removeprefix("torch.") for patch in self.patches],
            "shapes": [list(patch.full_shape) for patch in self.patches],
            "num_updates_list": [patch.indices.numel() for patch in self.patches],
        }
        tensors = {}
        for i, patch in enumerate(self.patches):
            tensors |= {f"{i}.indices": patch.indices.contiguous(), f"{i}.values": patch.values.contiguous()}
        return files.save(tensors, {HEADER: json.dumps(told)})

    @classmethod
    def from_bytes(cls, data: bytes | bytearray, before: Iterable[WeightPatch] = ()) -> WeightUpdate:
        """Reads what `to_bytes` wrote; raises DeltaFormatError for anything else, or if the digest does not fit."""
        told, tensors = read_tensors(data)
        try:
            rows = zip(told["names"], told["shapes"], strict=True)
            patches = tuple(
                WeightPatch(name, tensors[f"{i}.indices"], tensors[f"{i}.values"], tuple(shape))
                for i, (name, shape) in enumerate(rows)
            )
            update = cls(told["base"], told["target"], patches, tuple(before))
            check(update.patches)
            fits = update.digest == told["digest"]
        except (KeyError, TypeError, ValueError, AttributeError) as why:
            raise DeltaFormatError(f"these bytes are no update: {short(why)}") from why
        if not fits:
            raise DeltaFormatError("the update is damaged: its patches do not have the digest that it was sent with")
        return update


def read_tensors(data: bytes | bytearray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON in an update's header, and its tensors."""
    try:
        header = plain(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]))
        told = plain(header["__metadata__"][HEADER].encode())
        return told, files.load(bytes(data))
    except (NotPlain, SafetensorError, KeyError, TypeError, AttributeError) as why:
        raise DeltaFormatError(f"these bytes are no update: {short(why)}") from why


def content_digest(patches: Iterable[WeightPatch]) -> str:
    """sha256 over names, shapes, dtypes, places and the values' bits."""
    found = hashlib.sha256()
    for patch in patches:
        about = [patch.name, list(patch.full_shape), dtype_name(patch.values.dtype), patch.indices.numel()]
        found.update(json.dumps(about).encode())
        found.update(raw(patch.indices).data)
        found.update(raw(patch.values).data)
    return found.hexdigest()


def next_version(base: str, patches: Iterable[WeightPatch]) -> str:
    """The version that patches make of version `base`: 16 hex digits over both."""
    return hashlib.sha256(f"{base} {content_digest(patches)}".encode()).hexdigest()[:16]


def check(patches: Iterable[WeightPatch]) -> None:
    """Raises DeltaError for a patch that a server could not write, NonFiniteError for NaN or infinity."""
    seen = set()
    for patch in patches:
        name, indices, values = patch.name, patch.indices, patch.values
        numel = torch.Size(patch.full_shape).numel()
        if name in seen:
            raise DeltaError(f'"{name}" occurs twice in one update; each tensor has one patch')
        seen.add(name)
        if indices.dtype != torch.int32 or indices.dim() != 1 or indices.shape != values.shape:
            raise DeltaError(
                f'the patch of "{name}" needs int32 indices (n,) and as many values; got {indices.dtype} '
                f"{tuple(indices.shape)} and {tuple(values.shape)}"
            )
        if values.dtype not in FLOATS.values():
            raise DeltaError(f'"{name}" is {dtype_name(values.dtype)}; sparse weight transfer takes floats only')
        if indices.numel() and not (0 <= int(indices[0]) and int(indices[-1]) < numel):
            raise DeltaError(f'places of "{name}" lie outside its {numel} entries')
        if bool((indices.diff() <= 0).any()):
            raise DeltaError(f'the places of "{name}" do not rise strictly')
        if (at := bits.first_non_finite(values)) is not None:
            raise NonFiniteError(f'value {at} for "{name}" is {values[at].item()}; NaN would mean "unchanged" there')


def places(name: str, flat: Tensor, numel: int) -> Tensor:
    """Flat places as int32; DeltaError for a tensor with more entries than that can name."""
    if numel - 1 > MOST:
        raise DeltaError(f'"{name}" has {numel:,} entries; int32 places reach {MOST + 1:,}')
    return flat.to(torch.int32).cpu()


def cast(name: str, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Values in the dtype that is served; DeltaError if one of them would be rounded."""
    if dtype is None or values.dtype == dtype:
        return values
    served = values.to(dtype)
    lost = int((int_view(served.to(values.dtype)) != int_view(values)).sum())
    if lost:
        raise DeltaError(
            f'{lost:,} of {values.numel():,} new values of "{name}" are no {dtype_name(dtype)} numbers, so a server '
            f"would hold other weights than the trainer. Train in that dtype, or serve {dtype_name(values.dtype)}"
        )
    return served


def changes(delta: Delta, model: nn.Module) -> Iterator[tuple[Entry, Tensor, Tensor, Tensor]]:
    """(tensor, places (n,), new values (n,), base values (n,)) of a delta on its bare base; equal bits are left out."""
    found = inventory(model).find
    for part in delta.parts:
        entry = found[part.name]
        new = part.new.reshape(-1)
        flat = torch.arange(new.numel()) if part.where is None else part.where
        old = bits.gather(entry.tensor, flat)
        moved = (int_view(old) != int_view(new)).nonzero().reshape(-1)
        if moved.numel():
            yield entry, flat[moved], new[moved], old[moved]


def update_of(
    delta: Delta, model: nn.Module, names: Mapping[str, str], dtype: torch.dtype | None = None
) -> WeightUpdate:
    """A delta as patches on its bare base, under the checkpoint's `names`, in the dtype that is served.

    The way back holds the base's values, rounded as a server rounds the base's checkpoint. Raises DeltaError for what
    a patch cannot hold: a tensor that the checkpoint lacks, one that is not of floats, a value that would be rounded.
    """
    patches, before = [], []
    for entry, flat, new, old in changes(delta, model):
        if entry.name not in names:
            raise DeltaError(
                f'"{entry.name}" is not in the base\'s checkpoint, so a server of the base has no such tensor. '
                "Export the whole model: selectune export merged"
            )
        shape, at = tuple(entry.tensor.shape), places(entry.name, flat, entry.tensor.numel())
        patches.append(WeightPatch(names[entry.name], at, cast(entry.name, new, dtype), shape))
        before.append(WeightPatch(names[entry.name], at, old.to(dtype or old.dtype), shape))
    check(patches)
    base = delta.info["base"]["weights"] or delta.info["base"]["fingerprint"]
    return WeightUpdate(base[:16], next_version(base[:16], patches), tuple(patches), tuple(before))


def fresh(loaded: LoadedModel) -> list[str]:
    """The tensors that no checkpoint holds, such as a head that was drawn from a seed."""
    found = inventory(loaded.model)
    return sorted({found.find[name].name for name in map(canonical_name, loaded.initialised) if name in found.find})


def tell_fresh(kind: str, loaded: LoadedModel) -> dict[str, Any]:
    """Warns of tensors that no checkpoint holds and that this kind leaves out; what `export` says of them."""
    names = fresh(loaded)
    if names:
        log.warning(
            "%s holds only what training changed. %d tensors of the model are in no checkpoint of its base (%s): they "
            "were drawn from seed %d, so whoever uses the file needs them too. selectune export merged writes the "
            "whole model.", kind, len(names), some(names), loaded.seed,
        )  # fmt: skip
    return {"fresh": names} if names else {}


def checkpoint_names(loaded: LoadedModel, source: Source) -> dict[str, str]:
    """{tensor: its name in the base's checkpoint}, tied tensors once; tensors that no checkpoint holds are left out.

    Where the checkpoint is not a local folder of safetensors, the names are those that the model would be saved under.
    """
    from safetensors import safe_open

    found = inventory(loaded.model)
    drawn = set(fresh(loaded))
    prefix = f"{getattr(loaded.model, 'base_model_prefix', '')}."
    place = resolve(source.model, source.revision)
    shards = sorted(Path(place.location).glob("*.safetensors")) if place.local and place.gguf is None else []
    there: set[str] | None = None if not shards else set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            there = {*(there or ()), *file.keys()}
    names = {}
    for entry in found.entries:
        if entry.name in drawn:
            continue
        tried = [name for own in entry.names for name in (own, own.removeprefix(prefix), prefix + own)]
        known = entry.name if there is None else next((name for name in tried if name in there), None)
        if known is None:
            raise BaseMismatchError(
                f'"{entry.name}" has none of its names in the checkpoint of {source.model} (tried {", ".join(tried)}); '
                "its architecture is converted as it is loaded, and a patch would not find its tensor"
            )
        names[entry.name] = known
    return names


def vllm(delta: Delta, loaded: LoadedModel, source: Source, folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Writes `patch.safetensors` and `revert.safetensors`, the way there and the way back."""
    update = update_of(delta, loaded.model, checkpoint_names(loaded, source), dtype)
    for name, way in (("patch", update), ("revert", update.reverse())):
        (folder / f"{name}.safetensors").write_bytes(way.to_bytes())
    told = {"base": update.base, "target": update.target, "scalars": update.scalars, "tensors": len(update.patches)}
    return told | tell_fresh("vllm", loaded)


def write(model: nn.Module, patches: Iterable[WeightPatch], names: Mapping[str, str] | None = None) -> None:
    """Writes patches into a plain model, all of them or none; `names`: {name in the patches: name in the model}.

    Raises BaseMismatchError for a tensor that the model lacks or has in another shape or dtype, and as `check` does.
    """
    patches, found = list(patches), inventory(model).find
    check(patches)
    targets = []
    for patch in patches:
        name = (names or {}).get(patch.name, patch.name)
        tensor = found[name].tensor if name in found else None
        if tensor is None or tuple(tensor.shape) != tuple(patch.full_shape) or tensor.dtype != patch.values.dtype:
            got = "no such tensor" if tensor is None else f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            raise BaseMismatchError(
                f'the patch of "{name}" is for {dtype_name(patch.values.dtype)} {tuple(patch.full_shape)}; the model '
                f"has {got}. Nothing was written"
            )
        targets.append(tensor)
    with torch.no_grad():
        for tensor, patch in zip(targets, patches, strict=True):
            bits.scatter(tensor, patch.indices.long(), patch.values)


def agrees(model: nn.Module, patches: Iterable[WeightPatch]) -> bool:
    """Whether a model holds the values of patches, bit for bit."""
    found = inventory(model).find
    return all(same_bits(bits.gather(found[p.name].tensor, p.indices.long()), p.values) for p in patches)
