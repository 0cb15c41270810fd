"""A delta from an adapter of peft: SHiRA, Super-Tuning, trainable tokens, and the modules that peft saved whole.

The new weights are computed by the operation that peft's own `merge` uses, so they have its bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as files
from torch import Tensor, nn

from selectune.errors import ConfigError, DeltaError, DeltaFormatError
from selectune.files import read_json, read_owned
from selectune.interop.pairs import tensors_of
from selectune.interop.to_peft import PREFIX

KINDS = ("SHIRA", "SUPERTUNING", "TRAINABLE_TOKENS")
_PARTS = ("shira_weight", "shira_indices", "supertuning_values", "supertuning_indices", "trainable_tokens_delta")


def read_peft(folder: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, new tensor) of each tensor that the adapter in a folder changes; `model`: its base.

    Raises DeltaFormatError for a folder without an adapter, ConfigError for an adapter of another kind or one with a
    low-rank part (Supra), DeltaError if it does not fit the base.
    """
    config = read_json(folder / "adapter_config.json", error=DeltaFormatError)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ConfigError(
            f"{folder} holds an adapter of kind {kind!a}; {', '.join(KINDS)} change scattered scalars and can be read. "
            "Merge any other in peft (merge_and_unload) and compare the models: selectune delta diff"
        )
    if config.get("r") is not None and kind == "SUPERTUNING":
        raise ConfigError(f"{folder} has a low-rank part (Supra, r={config['r']}): it changes every scalar")
    try:
        tensors = files.load(bytes(read_owned(folder / "adapter_model.safetensors")))
    except SafetensorError as why:
        raise DeltaFormatError(f"{folder}/adapter_model.safetensors is no safetensors file: {why}") from why
    base, modules, whole, done = tensors_of(model), {}, {}, set()
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise DeltaFormatError(f"{folder} has a tensor {key[:80]!a}, which does not begin with {PREFIX}")
        name = key.removeprefix(PREFIX)
        module, _, leaf = name.rpartition(".")
        (modules.setdefault(module, {}) if leaf in _PARTS else whole)[leaf if leaf in _PARTS else name] = tensor
    for module, parts in modules.items():
        weight = _base(base, f"{module}.weight", folder)
        if id(weight) not in done:  # a tied output layer repeats the rows of its embedding
            done.add(id(weight))
            try:
                yield f"{module}.weight", _added(kind, weight, parts, config)
            except (KeyError, RuntimeError, TypeError, IndexError) as why:
                raise DeltaError(f'{folder} does not fit "{module}" {tuple(weight.shape)}: {str(why)[:200]}') from why
    for name, tensor in whole.items():
        _base(base, name, folder)
        yield name, tensor


def _base(base: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in base:
        raise DeltaError(f'{folder} changes "{name}", which the base does not have; it is of another model')
    return base[name]


def _added(kind: str, weight: Tensor, parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """The weight with an adapter on it."""
    if kind == "SHIRA":
        size = weight.T.shape if config.get("fan_in_fan_out") else weight.shape
        added = torch.sparse_coo_tensor(parts["shira_indices"], parts["shira_weight"] * 1.0, size)
        new = weight.clone()
        new += added.T if config.get("fan_in_fan_out") else added
        return new
    if kind == "SUPERTUNING":
        if "supertuning_indices" not in parts:
            raise KeyError("it was saved without its indices (save_precomputed_indices=False)")
        flat, values = parts["supertuning_indices"].long(), parts["supertuning_values"].to(weight.dtype)
        return weight.reshape(-1).scatter_add(0, flat, values).reshape_as(weight)
    rows = torch.tensor(config["token_indices"])
    return weight.index_copy(0, rows, parts["trainable_tokens_delta"].to(weight))
