"""`selectune.load_model`: the base with the delta applied, in one call and in a new process."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from selectune.delta import Delta, load
from selectune.errors import ModelError
from selectune.models.restore import Source, apply_to, load_base
from selectune.models.wheels import WHEELS


def load_model(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The trained model: the delta's base as `from_pretrained` gives it, with its head, and the delta applied.

    The model is in eval mode, on the CPU; `selectune.load(path).revert(model)` reverts the delta. `path`: a file, a
    folder, or `org/name@revision` on the hub, as `selectune.load` takes it. `base`: a folder, a hub id, 'demo' or
    'smollm'; by default the place that the delta records; `revision` is that of the base. The bits
    are compared with the base's: where the delta writes, or everywhere if the delta carries the digest of all weights.
    A delta names a class of transformers and weights, never code; the base's own code runs only with
    `trust_remote_code`.

    Raises DeltaError for a file that is not a delta, ModelError for a base that cannot be found or loaded,
    BaseMismatchError for another base, UnknownTaskError if only an unknown task says which head the delta needs.
    """
    delta = load(path)
    name = place_of(delta, path) if base is None else str(base)
    chosen = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    source = Source(name, revision, chosen, trust_remote_code)
    loaded = load_base(source, delta, None, tokenizer="model" not in delta.info)
    apply_to(delta, loaded)
    return loaded.model


def place_of(delta: Delta, path: str | os.PathLike[str]) -> str:
    """The place that the delta records for its base. Raises ModelError if there is none, or no folder is there."""
    recorded, model = delta.info["base"], delta.info.get("model")
    if recorded["id"] in WHEELS:
        return recorded["id"]
    folder = None if model is None else model["path"]
    if folder is not None and not Path(folder).is_dir():
        raise ModelError(
            f"The base of {path} was the folder {folder}, which does not exist here. Say where it is now: "
            f"selectune.load_model({str(path)!r}, base=...), a folder or a hub id."
        )
    hub = recorded["id"] if model is not None or recorded["revision"] else None
    where = folder or hub
    if where is None:
        raise ModelError(
            f"The delta {path} does not record where its base is{', only its name' if recorded['id'] else ''}: the "
            f"base did not come from from_pretrained, or the delta is of an older selectune. Say where it is: "
            f"selectune.load_model({str(path)!r}, base=...), a folder or a hub id."
        )
    return where
