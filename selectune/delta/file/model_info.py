"""What a delta records of its base: where the model came from, its class, and which tensors no checkpoint held.

All of it is read off the attributes of a transformers model; nothing is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selectune.delta.file.fingerprint import (
    Inventory,
    inventory,
    never_loaded,
    structure_of,
    unwrapped,
    weights_of,
)
from selectune.delta.file.schema import MAX_LABELS, MODEL_DTYPES, canonical_name
from selectune.errors import BaseMismatchError
from selectune.internals import class_before


def base_info(
    model: nn.Module,
    id: str | None = None,
    revision: str | None = None,
    seed: int | None = None,
    initialised: Iterable[str] | Mapping[str, str] | None = None,
    full: bool = False,
    sharded: bool = False,
) -> dict[str, Any]:
    """Describe a base model for `info["base"]`; call it while the model holds the base's weights.

    `id` and `revision` default to those in the config of a transformers model. `initialised` names the tensors that no
    checkpoint held (a new task head), or maps them to digests that were taken before training; by default these are the
    parameters that `never_loaded` finds. `full` adds the digest of all weights (one read of them). Delta fills in the
    fingerprint. `sharded`: weights may be sharded, and are gathered one at a time; all ranks call it together.

    Raises BaseMismatchError for a name in `initialised` that the model does not have.
    """
    found = inventory(model, sharded)
    if initialised is None:
        initialised = [name for name in never_loaded(found) if not _of_adapter(found, name)]  # it has its own digest
    if not isinstance(initialised, Mapping):
        names = [canonical_name(name) for name in initialised]
        unknown = sorted(name for name in names if name not in found.find)
        if unknown:
            raise BaseMismatchError(
                f'"{unknown[0]}" is named as initialised, but the model has no such tensor; '
                f"it has {len(found.find)}, from {', '.join(list(found.find)[:3]) or 'none'}"
            )
        initialised = {name: found.find[name].digest() for name in names}
    rows = [{"name": canonical_name(name), "digest": digest} for name, digest in initialised.items()]
    if id is None and revision is None:
        id, revision = _origin(model)
    return {
        "id": id,
        "revision": revision,
        "seed": seed,
        "initialised": sorted(rows, key=lambda row: row["name"]),
        "structure": structure_of(found),
        "fingerprint": None,
        "weights": weights_of(found, [row["name"] for row in rows]) if full else None,
    }


def model_info(model: nn.Module, sharded: bool = False) -> dict[str, Any] | None:
    """Describe a transformers model for `info["model"]`, so that it can be made again; None for any other model."""
    inner = _inner(model)
    config = getattr(inner, "config", None)
    if not isinstance(getattr(config, "model_type", None), str) or not class_before(inner).__name__.isidentifier():
        return None
    named = getattr(config, "id2label", None)
    count = len(named) if isinstance(named, Mapping) else None
    problem, padding = getattr(config, "problem_type", None), getattr(config, "pad_token_id", None)
    folder = str(_folder(config) or "")
    return {
        "architecture": class_before(inner).__name__,
        "dtype": _dtype(inventory(model, sharded)),
        "labels": _labels(named, count),
        "num_labels": count,
        "pad_token_id": padding if type(padding) is int else None,
        "path": folder if folder and folder.isprintable() else None,
        "problem_type": problem if isinstance(problem, str) and problem != _inferred(count) else None,
    }


def _inferred(outputs: int | None) -> str:
    """The problem type that transformers writes into a config at the first forward with labels, if none is there."""
    return "regression" if outputs == 1 else "single_label_classification"


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers and inside peft's own model."""
    model = unwrapped(model)
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    return inner if isinstance(inner, nn.Module) else model


def _origin(model: nn.Module) -> tuple[str | None, str | None]:
    """Id and revision as the command line records them: a hub id and its commit, or the name of a folder and None."""
    config = getattr(_inner(model), "config", None)
    name, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not isinstance(name, str) or not name:
        return None, None
    folder = _folder(config)
    if folder is not None:
        return folder.name, None
    return name, commit if isinstance(commit, str) else None


def _folder(config: Any) -> Path | None:
    """The absolute path of the folder that a config was read from; None for a config from the hub."""
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name or not Path(name).expanduser().is_dir():
        return None
    return Path(name).expanduser().resolve()


def _labels(named: Any, count: int | None) -> list[str] | None:
    """The labels in order of their numbers; None if they are transformers' own LABEL_0, LABEL_1 and so on."""
    if not isinstance(named, Mapping) or count is None or count > MAX_LABELS:
        return None
    labels = [named.get(number) for number in range(count)]
    known = [label for label in labels if isinstance(label, str) and label.isprintable() and len(label) <= 4096]
    if len(known) != count or known == [f"LABEL_{number}" for number in range(count)]:
        return None
    return known


def _dtype(found: Inventory) -> str | None:
    """The dtype of most of the model's parameters, leaving out those of an adapter on it."""
    counts = Counter[torch.dtype]()
    for entry in found.entries:
        if entry.kind == "parameter" and entry.quantised is None and not _of_adapter(found, entry.name):
            counts[entry.tensor.dtype] += entry.tensor.numel()
    name = str(counts.most_common(1)[0][0]).removeprefix("torch.") if counts else ""
    return name if name in MODEL_DTYPES else None


def _of_adapter(found: Inventory, name: str) -> bool:
    return found.adapter is not None and found.adapter.owns(name)
