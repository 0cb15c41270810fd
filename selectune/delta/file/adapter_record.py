"""A module on the base: LoRA, adapters, virtual tokens. A delta records how to make it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from selectune.delta.file.fingerprint import Entry, Inventory, digest_bits, inventory
from selectune.delta.file.schema import MODULES, canonical_json, sha256
from selectune.errors import ConfigError

_RECORDS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def belongs(kind: str, name: str) -> bool:
    """Whether a tensor belongs to a module of a kind: a component of its name says so (docs/delta-format.md).

    >>> belongs("lora", "layer.0.query.lora_A.default.weight"), belongs("lora", "layer.0.query.base_layer.weight")
    (True, False)
    """
    return not set(MODULES[kind]).isdisjoint(name.split("."))


def module_digest(kind: str, found: Inventory, value: Callable[[Entry], Tensor] = lambda entry: entry.tensor) -> str:
    """sha256 over names and bits of the module's tensors: one read of them."""
    rows = [[name, digest_bits(value(found.find[name]))] for name in found.find if belongs(kind, name)]
    return sha256(canonical_json(sorted(rows)))


def record_module(model: nn.Module, kind: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Remember what was put on a model, as its deltas record it; call it while the module's tensors are as drawn.

    Raises ConfigError for a model that has a module on record already.
    """
    if model in _RECORDS:
        raise ConfigError(f"The model carries {_RECORDS[model]['kind']} already; take it off before {kind} is put on.")
    found = inventory(model)
    _RECORDS[model] = {
        "kind": kind, "options": dict(options), "seed": seed, "digest": module_digest(kind, found)
    }  # fmt: skip
    return _RECORDS[model]


def forget_module(model: nn.Module) -> None:
    """The module was taken off."""
    _RECORDS.pop(model, None)


def module_of(model: nn.Module) -> dict[str, Any] | None:
    """What is on record for a model, or None."""
    return _RECORDS.get(model)
