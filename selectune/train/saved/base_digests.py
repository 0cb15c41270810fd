"""Digests of the base that a delta records, computed while the model is in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from selectune.delta import base_info, canonical_name, digest_bits, inventory
from selectune.delta.file.fingerprint import Entry, all_digests
from selectune.train.support.ledger import Ledger
from selectune.train.support.proof import BaseCopy


def base_of(
    model: nn.Module, ledger: Ledger, before: BaseCopy, given: Mapping[str, Any] | None, full: bool
) -> dict[str, Any]:
    """`info["base"]` of a run: the caller's description of the base, or the model's own, with the base's digests.

    `full` adds a digest of all weights unless the caller gives one: they are read once, at a run's first save.
    """
    described = dict(given) if given is not None else base_info(model, sharded=True)
    found = inventory(model, sharded=True)
    rows = [{**row} for row in described.get("initialised") or ()]
    names = [row["name"] for row in rows if row["name"] in found.find]
    entries = found.entries if full and described.get("weights") is None else [found.find[name] for name in names]
    missing = [entry for entry in entries if entry.name not in before.digests]
    if missing:
        value = _values(ledger, before, found.find)
        before.digests |= {e.name: e.quantised.digest() if e.quantised else digest_bits(value(e)) for e in missing}
    for row in rows:
        if row["name"] in found.find:
            row["digest"] = before.digests[found.find[row["name"]].name]
    if full and described.get("weights") is None:
        described["weights"] = all_digests(found, before.digests, names)
    return {**described, "initialised": rows}


def _values(ledger: Ledger, before: BaseCopy, find: Mapping[str, Entry]) -> Any:
    """A function that gives a tensor of the base: a copy if the model's tensor has moved."""
    whole = {find[canonical_name(n)].name: t for n, t in (before.whole | before.filled).items()}
    whole |= {find[name].name: t for n, t in before.buffers.items() if (name := canonical_name(n)) in find}
    scoped = {find[canonical_name(t.name)].name: t for t in before.scoped.values()}

    def value(entry: Entry) -> Tensor:
        if entry.name in whole:
            return whole[entry.name]
        tensor = scoped.get(entry.name)
        page = None if tensor is None else ledger.pages[tensor.index]
        if tensor is None or page is None or not page.touched()[0].numel():
            return entry.tensor.detach()
        return ledger.store.base(tensor.index, page)

    return value
