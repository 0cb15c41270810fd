"""A plain model folder: base + delta, as transformers writes it, in the shards of the base, or dequantised."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from selectune.delta import Delta
from selectune.errors import ConfigError
from selectune.files import read_json
from selectune.models.adapted import mergeable
from selectune.models.bases import LoadedModel, quiet, resolve
from selectune.models.restore import Source, apply_to, refuse_quantised
from selectune.quantised import quantised_weights

INDEX = "model.safetensors.index.json"
RECIPE = "mergekit.yml"


def merged(delta: Delta, loaded: LoadedModel, source: Source, folder: Path, dtype: Any = None) -> dict[str, Any]:
    """Writes the model with its weights in their dtype, its config, generation config and tokenizer.

    Raises ConfigError for a delta on an adapter that is no change of weights.
    """
    mergeable(delta)
    refuse_quantised(delta, loaded)
    apply_to(delta, loaded)
    delta.merge(loaded.model)
    if loaded.adapted is not None:
        loaded.adapted.merge()
    shards = _shards(source)
    with quiet():
        loaded.model.save_pretrained(folder, max_shard_size="1000TB" if shards else "50GB")
        loaded.tokenizer.save_pretrained(folder)
    if shards:
        _reshard(folder, shards)
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    return {"scalars": delta.selected, "shards": len(weights)}


def dequantised(delta: Delta, loaded: LoadedModel, source: Source, folder: Path, dtype: Any = None) -> dict[str, Any]:
    """Writes the quantised base as plain floats with the offsets added: a model folder that needs no such library.

    Each sum is rounded once to the dtype of the dequantised weight, and a plain layer rounds its product otherwise than
    a quantised one with offsets beside it, so outputs are close and not equal to the bit. Raises ConfigError for a
    base that is not quantised, and for a delta on an adapter.
    """
    packed = quantised_weights(loaded.model)
    if not packed:
        raise ConfigError("The delta's base is not quantised. Export it with: selectune export merged")
    if loaded.adapted is not None:
        raise ConfigError(f"The delta is of {loaded.adapted.spec.kind} on a quantised base. Export it as peft.")
    apply_to(delta, loaded)
    plain = {key: nn.Parameter(weight.now()) for key, weight in packed.items()}
    for parent in list(loaded.model.modules()):
        for name, layer in parent.named_children():
            if (weight := plain.get(id(layer._parameters.get("weight")))) is not None:
                setattr(parent, name, _plain(layer, weight))
    with quiet():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return {"scalars": delta.selected, "shards": len(list(folder.glob("*.safetensors"))), "dequantised": len(plain)}


def _plain(layer: nn.Module, weight: nn.Parameter) -> nn.Module:
    """The ordinary layer with this weight."""
    rows, width = weight.shape
    made: nn.Linear | nn.Embedding
    if isinstance(layer, nn.Embedding):
        made = nn.Embedding(rows, width, layer.padding_idx, device="meta")
    elif isinstance(layer, nn.Linear):
        made = nn.Linear(width, rows, bias=False, device="meta")
        made.bias = layer.bias
    else:
        raise ConfigError(f"A {type(layer).__name__} cannot be written as an ordinary layer.")
    made.weight, made.training = weight, layer.training
    return made


def mergekit(delta: Delta, loaded: LoadedModel, source: Source, folder: Path, dtype: Any = None) -> dict[str, Any]:
    """Writes the merged model and a recipe for mergekit, in which its difference from the base is a task vector.

    mergekit subtracts the base from the folder by itself. Raises ConfigError if it could not: the base has no such
    head, or is no folder of safetensors.
    """
    place = resolve(source.model, source.revision)
    if place.gguf is not None:
        raise ConfigError(f"mergekit reads no GGUF, which {source.model} is; give a base in safetensors.")
    if loaded.initialised:
        raise ConfigError(
            f"mergekit needs every tensor in the base as well, and {loaded.initialised[0]} is in no checkpoint; a "
            "model with a new head cannot be a task vector. Export it with: selectune export merged"
        )
    told = merged(delta, loaded, source, folder)
    kept = str(loaded.model.dtype).removeprefix("torch.")
    wide = "float64" if kept == "float64" else "float32"  # half precision would round the difference
    where = str(Path(place.location).resolve()) if place.local else place.location
    (folder / RECIPE).write_text(
        "# mergekit-yaml mergekit.yml OUT, run in this folder. At weight 1 the result is this model.\n"
        f"merge_method: task_arithmetic\nbase_model: {json.dumps(where)}\n"
        'models:\n  - model: "."\n    parameters:\n      weight: 1.0\n'
        f"dtype: {wide}\nout_dtype: {kept}\n",
        encoding="utf-8",
    )
    return {**told, "recipe": RECIPE}


def _shards(source: Source) -> dict[str, str]:
    """{tensor: file} of the base's checkpoint; empty if it is one file, or is not there as safetensors."""
    from transformers.utils import cached_file

    place = resolve(source.model, source.revision)
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(place.location, INDEX, revision=None if place.local else place.revision, **lenient)
    if found is None:
        return {}
    index = read_json(found, limit=1 << 28, error=ConfigError)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    fine = isinstance(shards, dict) and all(map(_is_shard, shards.values()))
    return shards if isinstance(shards, dict) and fine else {}


def _is_shard(name: Any) -> bool:
    """Whether a name in a downloaded index is one of a file beside it."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+-of-\d+\.safetensors", name) is not None


def _reshard(folder: Path, shards: dict[str, str]) -> None:
    """Splits the one file of weights into the base's files; tensors that the base lacks go into the last of them."""
    whole = folder / "model.safetensors"
    ends = {key.partition(".")[2]: shard for key, shard in shards.items()}  # the base may lack a prefix, or we may
    last = max(shards.values())
    with safe_open(whole, "pt") as file:
        groups: dict[str, list[str]] = {}
        for key in file.keys():
            short = key.partition(".")[2]
            shard = shards.get(key) or shards.get(short) or ends.get(key) or last
            groups.setdefault(shard, []).append(key)
        size = 0
        for shard, keys in groups.items():
            tensors = {key: file.get_tensor(key) for key in keys}
            size += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, folder / shard, {"format": "pt"})
    whole.unlink()
    placed = {key: shard for shard, keys in sorted(groups.items()) for key in sorted(keys)}
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
