"""`selectune.load_model`: the base and the delta on it, in one call and in a new process."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from selectune.delta import Delta, load
from selectune.errors import ModelError
from selectune.models.bases import DEMO
from selectune.models.restore import Source, apply_to, load_base


def load_model(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model that was trained: the delta's base as `from_pretrained` gives it, with its head, and the delta on it.

    In eval mode, on the CPU; `selectune.load(path).revert(model)` takes the delta off. `base`: where the base lies now,
    a folder, a hub id or 'demo'; by default where the delta says. Its bits must be the base's: wherever the delta
    writes, and everywhere if the delta carries the digest of all weights. What it records names a class of
    transformers and weights, never code; code that the base brings is run with `trust_remote_code` only.

    Raises DeltaError for a file that is none, ModelError for a base that cannot be found or loaded, BaseMismatchError
    for one that is another, UnknownTaskError for the delta of a task that alone says which head it needs.
    """
    delta = load(path)
    name = _place(delta, path) if base is None else str(base)
    chosen = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    source = Source(name, revision, chosen, trust_remote_code)
    loaded = load_base(source, delta, None, tokenizer="model" not in delta.info)
    apply_to(delta, loaded)
    return loaded.model


def _place(delta: Delta, path: str | os.PathLike[str]) -> str:
    """Where the delta says that its base lies; raises ModelError where it does not, or where nothing lies there."""
    recorded, model = delta.info["base"], delta.info.get("model")
    if recorded["id"] == DEMO:
        return DEMO
    folder = None if model is None else model["path"]
    if folder is not None and not Path(folder).is_dir():
        raise ModelError(
            f"The base of {path} was the folder {folder}, which does not exist here. Say where it lies now: "
            f"selectune.load_model({str(path)!r}, base=...), a folder or a hub id."
        )
    hub = recorded["id"] if model is not None or recorded["revision"] else None
    where = folder or hub
    if where is None:
        raise ModelError(
            f"Where the base of {path} lies is not recorded{', its name alone' if recorded['id'] else ''}: it is no "
            f"model that from_pretrained gave, or the delta is of an older selectune. Say where: "
            f"selectune.load_model({str(path)!r}, base=...), a folder or a hub id."
        )
    return where
