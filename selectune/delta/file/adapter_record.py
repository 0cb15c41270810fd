"""What is on record of an adapter (LoRA, bottlenecks, virtual tokens) on a model, so that it can be made again.

The record is an attribute of the model, so a copy of the model has it too. A delta stores it without the markers. The
kinds of adapters are no business of the file: selectune.adapters knows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from selectune.errors import ConfigError

_ATTRIBUTE = "_selectune_adapter"  # plain values, so that a pickled model needs no selectune


@dataclass(frozen=True)
class AdapterRecord:
    """How an adapter is made again, and which of the model's tensors are its own."""

    kind: str
    options: Mapping[str, Any]
    seed: int
    digest: str  # `adapter_digest` of its tensors as they were drawn
    markers: tuple[str, ...]

    @property
    def info(self) -> dict[str, Any]:
        """The record as `info["module"]` of a delta."""
        return {"kind": self.kind, "options": dict(self.options), "seed": self.seed, "digest": self.digest}

    def owns(self, name: str) -> bool:
        """Whether a tensor of this name is the adapter's."""
        return is_marked(name, self.markers)


def is_marked(name: str, markers: Iterable[str]) -> bool:
    """Whether a component of a tensor's name is one of an adapter's markers.

    >>> is_marked("layer.0.query.lora_A.default.weight", ["lora_A"]), is_marked("query.base_layer.weight", ["lora_A"])
    (True, False)
    """
    return not set(markers).isdisjoint(name.split("."))


def record_adapter(model: nn.Module, record: AdapterRecord) -> None:
    """Put an adapter on record; raises ConfigError for a model that has one on record already."""
    before = adapter_of(model)
    if before is not None:
        raise ConfigError(f"The model carries {before.kind} already; take it off before {record.kind} is put on.")
    model.__dict__[_ATTRIBUTE] = asdict(record)


def forget_adapter(model: nn.Module) -> None:
    """Remove the record: the adapter was taken off."""
    model.__dict__.pop(_ATTRIBUTE, None)


def adapter_of(model: nn.Module) -> AdapterRecord | None:
    """The adapter that is on record for a model, or None."""
    record = model.__dict__.get(_ATTRIBUTE)
    return None if record is None else AdapterRecord(**record)
