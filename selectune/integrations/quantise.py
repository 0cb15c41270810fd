"""A model that was loaded in full precision, quantised in place: by torchao, by bitsandbytes, or as its file was."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from selectune.delta import inventory
from selectune.delta.live.layers import stack_of
from selectune.errors import ConfigError
from selectune.integrations.gguf import bytes_of, keep_blocks
from selectune.quantised import quantised_weights

log = logging.getLogger("selectune")

Quantiser = Callable[[nn.Module, Iterable[str], str | Path | None], int]
"""(model, parameters to keep, GGUF file) -> how many weights were quantised."""


def quantise(model: nn.Module, kind: str, keep: Iterable[str] = (), file: str | Path | None = None) -> int:
    """Quantises the weights of a model in place; returns how many.

    `int8`: torchao's 8 bits, one scale for each row. `nf4`: bitsandbytes' 4-bit NormalFloat (Dettmers et al. 2023,
    arXiv:2305.14314), blocks of 64 with scales in 8 bits. Both take linear layers; embeddings, layers that share
    their weight (a tied head), and those that hold a parameter of `keep` (a head drawn for the task) stay as they are.
    `gguf`: the blocks of `file`, the GGUF file that the model was loaded from; embeddings and tied heads too.

    Raises ConfigError for another kind, for `gguf` without a file, if the kind's library is not installed, and for a
    model that is quantised already, or carries an adapter, a tuner or a delta.
    """
    if kind not in QUANTISED:
        raise ConfigError(f"Unknown quantisation '{kind}'. Known: {', '.join(QUANTISED)}.")
    if packed := quantised_weights(model):
        there = next(iter(packed.values())).stored.kind
        raise ConfigError(f"{len(packed)} weights of the model are quantised already ({there}). Load the model anew.")
    found = inventory(model)
    if found.attached or found.adapter is not None or stack_of(model):
        carried = "a tuner" if found.attached else "an adapter" if found.adapter is not None else "a delta"
        raise ConfigError(f"The model carries {carried}. Quantise the base first, and put {carried} on it afterwards.")
    return QUANTISED[kind](model, keep, file)


def bytes_saved(model: nn.Module, kind: str, file: str | Path | None = None) -> int:
    """By how many bytes `quantise` makes a model smaller. Reads no weight."""
    if kind == "gguf":
        packed, numbers = bytes_of(_known(file))
        return numbers * next(model.parameters()).element_size() - packed
    weights = [getattr(parent, name).weight for parent, name in _places(model, ())]
    return sum(w.nbytes - (w.numel() + 5 * w.shape[0] if kind == "int8" else w.numel() * 33 // 64) for w in weights)


def by_layer(made_by: Callable[[], Callable[[nn.Linear], nn.Module]]) -> Quantiser:
    """The kind that makes a layer of each linear layer. `made_by` imports its library."""

    def quantiser(model: nn.Module, keep: Iterable[str], file: str | Path | None) -> int:
        del file
        places, made = _places(model, keep), made_by()
        for parent, name in places:
            trainable = {n: p.requires_grad for n, p in getattr(parent, name).named_parameters()}
            layer = made(getattr(parent, name))
            if layer.bias is not None:
                layer.bias.requires_grad_(trainable["bias"])
            setattr(parent, name, layer)
        log.info("Quantised %d linear layers.", len(places))
        return len(places)

    return quantiser


def _by_file(model: nn.Module, keep: Iterable[str], file: str | Path | None) -> int:
    del keep  # no file holds a head that is drawn
    return keep_blocks(model, _known(file))


def _known(file: str | Path | None) -> str | Path:
    if file is None:
        raise ConfigError(
            "The quantisation 'gguf' keeps the blocks of the GGUF file that the model is loaded from, and this model "
            "comes from none. Name a .gguf file as the model, or take int8 or nf4."
        )
    return file


def _places(model: nn.Module, keep: Iterable[str]) -> list[tuple[nn.Module, str]]:
    held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    kept = {name.rpartition(".")[0] for name in keep}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        (parent, name)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not output and held[id(child.weight)] == 1
        and f"{path}.{name}".lstrip(".") not in kept
    ]  # fmt: skip


def _int8() -> Callable[[nn.Linear], nn.Module]:
    library = _library("torchao.quantization", "torchao")
    config = library.Int8WeightOnlyConfig()

    def made(layer: nn.Linear) -> nn.Module:
        library.quantize_(layer, config)
        return layer

    return made


def _nf4() -> Callable[[nn.Linear], nn.Module]:
    modules = _library("bitsandbytes.nn", "bitsandbytes")

    def made(layer: nn.Linear) -> nn.Module:
        weight, shape = layer.weight.detach(), (layer.in_features, layer.out_features)
        new = modules.Linear4bit(
            *shape, bias=layer.bias is not None, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        new.weight = modules.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new).to(weight.device)
        new.bias, new.training = layer.bias, layer.training
        new.support_avx512bf16_for_cpu = False  # in eval mode it would store the weight anew and round its scales
        return new

    return made


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"Quantising needs the package `{package}`, which is not installed: pip install 'selectune[quant]'."
        ) from error


QUANTISED: dict[str, Quantiser] = {"int8": by_layer(_int8), "nf4": by_layer(_nf4), "gguf": _by_file}
"""Kinds of quantisation by name."""
