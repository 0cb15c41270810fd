"""What a delta says of its base, told while the model is in training: digests of what stood where it moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from selectune import ops
from selectune.delta import base_info, canonical_name, digest_bits, inventory
from selectune.delta.file.fingerprint import Entry, all_digests
from selectune.train.ledger import Ledger

if TYPE_CHECKING:
    from selectune.train.proof import BaseCopy


def base_of(
    model: nn.Module, ledger: Ledger, before: BaseCopy, given: Mapping[str, Any] | None, full: bool
) -> dict[str, Any]:
    """`info["base"]` of a run: what the caller says of it, or the model does, with the digests that the base had.

    `full` adds that of all weights, where the caller gives none: one read of them at a run's first save.
    """
    told = dict(given) if given is not None else base_info(model)
    found = inventory(model)
    rows = [{**row} for row in told.get("initialised") or ()]
    names = [row["name"] for row in rows if row["name"] in found.find]
    entries = found.entries if full and told.get("weights") is None else [found.find[name] for name in names]
    missing = [entry for entry in entries if entry.name not in before.digests]
    if missing:
        value = _values(ledger, before, found.find)
        before.digests |= {entry.name: digest_bits(value(entry)) for entry in missing}
    for row in rows:
        if row["name"] in found.find:
            row["digest"] = before.digests[found.find[row["name"]].name]
    if full and told.get("weights") is None:
        told["weights"] = all_digests(found, before.digests, names)
    return {**told, "initialised": rows}


def _values(ledger: Ledger, before: BaseCopy, find: Mapping[str, Entry]) -> Any:
    """What gives the base's value of a tensor, in a copy where the model's has moved."""
    whole = {find[canonical_name(n)].name: t for n, t in (before.whole | before.filled).items()}
    whole |= {find[name].name: t for n, t in before.buffers.items() if (name := canonical_name(n)) in find}
    scoped = {find[canonical_name(t.name)].name: t for t in before.scoped.values()}

    def value(entry: Entry) -> Tensor:
        if entry.name in whole:
            return whole[entry.name]
        tensor = scoped.get(entry.name)
        flat, base = (None, None) if tensor is None else ledger.pages[tensor.index].touched()
        if flat is None or base is None or not flat.numel():
            return entry.tensor.detach()
        copy = entry.tensor.detach().clone()
        ops.scatter_entries(copy, flat, base)
        return copy

    return value
