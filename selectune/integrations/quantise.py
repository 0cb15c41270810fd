"""torchao and bitsandbytes: the linear layers of a model that was loaded in full precision, quantised in place."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from selectune.errors import ConfigError

log = logging.getLogger("selectune")


def quantise(model: nn.Module, kind: str, keep: Iterable[str] = ()) -> int:
    """Quantises the linear layers of a model in place; returns how many.

    `int8`: torchao's 8 bits, one scale for each row. `nf4`: bitsandbytes' 4-bit NormalFloat (Dettmers et al. 2023,
    arXiv:2305.14314), blocks of 64 with scales in 8 bits. Embeddings, layers that share their weight (a tied head),
    and those that hold a parameter of `keep` (a head that is drawn for the task) stay as they are.

    Raises ConfigError for another kind, and if its library is not installed.
    """
    if kind not in QUANTISED:
        raise ConfigError(f"Unknown quantisation '{kind}'. Known: {', '.join(QUANTISED)}.")
    places, made = _places(model, keep), QUANTISED[kind]()
    for parent, name in places:
        trainable = {n: p.requires_grad for n, p in getattr(parent, name).named_parameters()}
        layer = made(getattr(parent, name))
        if layer.bias is not None:
            layer.bias.requires_grad_(trainable["bias"])
        setattr(parent, name, layer)
    log.info("Quantised %d linear layers to %s.", len(places), kind)
    return len(places)


def bytes_saved(model: nn.Module, kind: str) -> int:
    """By how many bytes `quantise` makes a model smaller. Reads no weight."""
    weights = [getattr(parent, name).weight for parent, name in _places(model, ())]
    return sum(w.nbytes - (w.numel() + 5 * w.shape[0] if kind == "int8" else w.numel() * 33 // 64) for w in weights)


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


QUANTISED: dict[str, Callable[[], Callable[[nn.Linear], nn.Module]]] = {"int8": _int8, "nf4": _nf4}
"""Kinds of quantisation by name."""
