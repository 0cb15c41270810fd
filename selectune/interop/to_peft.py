"""An adapter that stock peft loads: LoRA as it was trained, Super-Tuning with zeros, whole modules, or rows of tokens.

Super-Tuning of peft (2026, arXiv 2607.09287) adds values to entries of linear weights, equally many for a share of each
layer. Here the share is that of the densest layer; the other layers are padded with additions of 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from selectune.adapters import KINDS, belongs
from selectune.bits import int_view
from selectune.delta import Delta
from selectune.errors import ConfigError, ModelError, some
from selectune.interop.patches import changes, fresh
from selectune.models.bases import LoadedModel
from selectune.models.restore import Source, apply_to

PREFIX = "base_model.model."
LIKE_LORA = ("lora", "loraplus", "dora", "ia3")
"""Adapters of peft that are exported as what they are."""


@dataclass
class _Split:
    """What changes of a model go where in peft's terms."""

    linear: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # module: places, new, old
    rows: dict[str, Tensor] = field(default_factory=dict)  # embedding module: its rows with changes
    whole: set[str] = field(default_factory=set)  # modules that are saved as they are


def to_peft(delta: Delta, loaded: LoadedModel, source: Source, folder: Path, dtype: Any = None) -> dict[str, Any]:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained(base, FOLDER)`.

    peft adds in the weight's dtype, so a weight may differ from the delta's in its last bits; `inexact` counts
    those, and `largest_error` is the largest difference. Modules with tensors that no checkpoint holds, such as a
    head that was drawn from a seed, are saved whole, because peft's user gets another draw. Raises ConfigError for
    what no one adapter of peft holds.
    """
    peft = _peft()
    model = loaded.model
    drawn = {name.rpartition(".")[0] for name in fresh(loaded)}
    split = _Split() if "module" in delta.info else _split(delta, model, drawn)
    apply_to(delta, loaded)
    common = {"base_model_name_or_path": source.model, "revision": loaded.revision, "inference_mode": True}
    if "module" in delta.info:
        config, tensors, told = _adapter(peft, delta, model, drawn, common)
    elif split.rows and not split.linear and not split.whole:
        config, tensors, told = _tokens(peft, model, split.rows, common)
    else:
        config, tensors, told = _supertuning(peft, model, split, common)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return {"peft_type": str(config.peft_type.value), "peft": peft.__version__, **told}


def _split(delta: Delta, model: nn.Module, drawn: set[str]) -> _Split:
    """`drawn`: modules to save whole. Raises ConfigError for changes that no adapter of peft holds."""
    modules = dict(model.named_modules())
    split, tied = _Split(whole=set(drawn)), []
    if "" in drawn:
        raise ConfigError(
            "A tensor that no checkpoint holds belongs to the model itself and to no module in it, and peft saves "
            "modules only. Export it with: selectune export merged"
        )
    for entry, flat, new, old in changes(delta, model):
        module, _, leaf = entry.name.rpartition(".")
        owner = modules[module]
        if isinstance(owner, nn.Embedding):
            split.rows[module] = (flat // owner.embedding_dim).unique()
        elif not module:
            raise ConfigError(
                f'"{entry.name}" belongs to the model itself and to no module in it, so peft can neither add to it nor '
                "save its module. Export it with: selectune export merged"
            )
        elif type(owner) is nn.Linear and leaf == "weight" and entry.kind == "parameter":
            split.linear[module] = flat, new, old
        else:
            split.whole.add(module)
        tied += [entry.name] if len(entry.names) > 1 else []
    only_rows = not split.linear and not split.whole and len({tuple(rows.tolist()) for rows in split.rows.values()}) < 2
    if tied and not (only_rows and all(isinstance(modules[n.rpartition(".")[0]], nn.Embedding) for n in tied)):
        raise ConfigError(
            f"{some(tied)}: a tied tensor, which peft holds only as rows of trainable tokens, with nothing else beside "
            "them. Leave it out of the scope, or export it with: selectune export merged"
        )
    if not only_rows:
        split.whole |= split.rows.keys()
        split.rows = {}
    split.whole = _with_namesakes(split.whole, modules)
    split.linear = {name: change for name, change in split.linear.items() if not _within(name, split.whole)}
    return split


def _with_namesakes(whole: set[str], modules: Iterable[str]) -> set[str]:
    """The modules that peft saves if it is told these names, as it takes any module whose name ends with one.

    A module within another is saved with it. Raises ConfigError if the whole model would be.
    """
    found = {name for name in modules if any(name.endswith(end) for end in whole)}
    return {name for name in found if not _within(name.rpartition(".")[0], found)}


def _within(name: str, whole: set[str]) -> bool:
    return any(name == outer or name.startswith(f"{outer}.") for outer in whole)


def _tokens(peft: Any, model: nn.Module, rows: dict[str, Tensor], common: dict[str, Any]) -> tuple[Any, dict, dict]:
    """Rows of embeddings, which peft replaces: exact. The rows of a tied output layer are the same ones."""
    indices = next(iter(rows.values()))
    config = peft.TrainableTokensConfig(token_indices=indices.tolist(), target_modules=sorted(rows), **common)
    modules = dict(model.named_modules())
    tensors = {}
    for name in rows:
        weight: Any = modules[name].weight
        tied = [n for n, module in modules.items() if getattr(module, "weight", None) is weight]
        tensors |= {f"{PREFIX}{n}.trainable_tokens_delta": weight.detach()[indices].clone() for n in tied}
    return config, tensors, {"rows": len(indices), "inexact": 0, "largest_error": 0.0}


def _adapter(
    peft: Any, delta: Delta, model: nn.Module, drawn: set[str], common: dict[str, Any]
) -> tuple[Any, dict, dict]:
    """An adapter of peft that the model carries, with the delta's values: exact. What is beside it is saved whole."""
    kind = delta.info["module"]["kind"]
    if kind not in LIKE_LORA:
        fits = "Export it with: selectune export merged" if KINDS[kind].merges else "selectune eval uses it as it is"
        raise ConfigError(
            f"The delta was trained on {kind}; export peft takes adapters of the kinds {', '.join(LIKE_LORA)}. {fits}"
        )
    modules: dict[str, Any] = dict(model.named_modules())
    beside = {part.name.rpartition(".")[0] for part in delta.parts if not belongs(kind, part.name)}
    if inside := sorted(name for name in beside if "base_layer" in name.split(".") or not name):
        raise ConfigError(
            f"{some(inside)}: trained beside the {kind} that lies on it, which no adapter of peft holds. Export it "
            "with: selectune export merged"
        )
    if under := sorted(name for name in drawn if "base_layer" in name.split(".") or not name):
        raise ConfigError(
            f"{some(under)}: in no checkpoint, so it is drawn from a seed, and the {kind} lies on it; no adapter of "
            "peft holds both. Export it with: selectune export merged"
        )
    whole = sorted(_with_namesakes(beside | drawn, modules))
    config = dataclasses.replace(modules[""].peft_config["default"], modules_to_save=whole or None, **common)
    found = peft.get_peft_model_state_dict(model)
    found |= {f"{name}.{leaf}": tensor for name in whole for leaf, tensor in modules[name].state_dict().items()}
    tensors = {f"{PREFIX}{name}": tensor.detach().clone().contiguous() for name, tensor in found.items()}
    return config, tensors, {"whole": whole, "inexact": 0, "largest_error": 0.0}


def _supertuning(peft: Any, model: nn.Module, split: _Split, common: dict[str, Any]) -> tuple[Any, dict, dict]:
    modules: dict[str, Any] = dict(model.named_modules())
    sizes = {name: modules[name].weight.numel() for name in split.linear}
    if not split.linear:
        raise ConfigError(
            "Super-Tuning of peft needs a change in the weight of a linear layer, and there is none but in whole "
            f"modules ({some(sorted(split.whole))}). Export it with: selectune export merged"
        )
    sparsity = _sparsity({name: change[0].numel() for name, change in split.linear.items()}, sizes)
    tensors, inexact, worst, padding = {}, 0, 0.0, 0
    for name, (flat, new, old) in split.linear.items():
        values = (new.double() - old.double()).to(torch.float32)
        got = old + values.to(old.dtype)
        inexact += int((int_view(got) != int_view(new)).sum())
        worst = max(worst, float((got.double() - new.double()).abs().max()))
        extra = int(sizes[name] * (1 - sparsity)) - flat.numel()
        padding += extra
        key = f"{PREFIX}{name}.supertuning_"
        tensors[f"{key}values"] = torch.cat((values, torch.zeros(extra)))
        tensors[f"{key}indices"] = torch.cat((flat, flat[:1].expand(extra))).to(torch.int32)
    for name in sorted(split.whole):
        tensors |= {f"{PREFIX}{name}.{k}": v.detach().clone() for k, v in modules[name].state_dict().items()}
    config = peft.SupertuningConfig(
        target_modules=sorted(split.linear), sparsity=sparsity, modules_to_save=sorted(split.whole) or None, **common
    )
    told = {"linear": len(split.linear), "whole": sorted(split.whole), "padding": padding}
    return config, tensors, {**told, "inexact": inexact, "largest_error": worst}


def _sparsity(counts: dict[str, int], sizes: dict[str, int]) -> float:
    """The largest sparsity at which peft gives every layer enough values: int(size * (1 - sparsity)) >= count.

    >>> sparsity = _sparsity({"a": 3, "b": 1}, {"a": 100, "b": 10})
    >>> int(100 * (1 - sparsity)), int(10 * (1 - sparsity))
    (10, 1)
    """
    sparsity = 1 - max(count / sizes[name] for name, count in counts.items())
    while any(int(sizes[name] * (1 - sparsity)) < count for name, count in counts.items()):
        sparsity = max(0.0, sparsity - 2**-50)
    return sparsity


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError("An adapter for peft needs the package `peft`: pip install 'selectune[peft]'.") from error
    return peft
