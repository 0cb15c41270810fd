"""Quantised models of several kinds: one of the tests' own, torchao's and bitsandbytes' where they are installed."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectune import quantised
from selectune.integrations.gguf import keep_blocks
from selectune.quantised import Stored


class Rows8(nn.Linear):
    """A linear layer in 8 bits with a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.bias = linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = Packed((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, numbers(self), self.bias)


class Packed(nn.Parameter):
    """Eight bits an entry."""


def numbers(module: Any) -> Tensor:
    return module.weight.data * module.scale


def rows8(module: Any, parameter: Any) -> Stored | None:
    """The kind, as anyone may add one."""
    if not isinstance(parameter, Packed):
        return None
    packed = parameter.detach().as_subclass(Tensor)
    parts = {"weight": packed, "scale": module.scale}
    return Stored("tests.rows8", packed.shape, parts, lambda: packed * module.scale)


quantised.KINDS.append(rows8)


def _own(model: nn.Module) -> None:
    _replace(model, Rows8)


def _torchao(bits: int) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("torchao.quantization", reason="torchao is not installed (the extra quant)")
        dtypes: Any = torch
        four = library.IntxWeightOnlyConfig(weight_dtype=dtypes.int4, granularity=library.PerGroup(8))
        library.quantize_(model, library.Int8WeightOnlyConfig() if bits == 8 else four)

    return quantise


def _bitsandbytes(bits: int) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quant)")

        def packed(linear: nn.Linear) -> nn.Module:
            shape = linear.in_features, linear.out_features
            options: dict[str, Any] = {"compute_dtype": torch.float32} if bits == 4 else {"has_fp16_weights": False}
            made = (library.nn.Linear4bit if bits == 4 else library.nn.Linear8bitLt)(
                *shape, bias=linear.bias is not None, **options
            )
            made.load_state_dict(linear.state_dict())
            return made.to("cpu")

        _replace(model, packed)

    return quantise


def _replace(model: nn.Module, made: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, made(child))


def _gguf(model: nn.Module) -> None:
    """The file that the model comes from is written first, with its rows in another order."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (requirements/lm.txt)")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        writer, kind = gguf.GGUFWriter(file, "llama"), gguf.GGMLQuantizationType.Q4_1
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                packed = gguf.quantize(layer.weight.detach().numpy(), kind)
                layer.weight.data.copy_(torch.from_numpy(gguf.dequantize(packed, kind)))
                writer.add_tensor(f"{name}.weight", packed[::-1].copy(), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert keep_blocks(model, file) == len(writer.tensors[0])


QUANTISE = {
    "own": _own,
    "int8": _torchao(8),
    "int4": _torchao(4),
    "nf4": _bitsandbytes(4),
    "llm-int8": _bitsandbytes(8),
    "gguf": _gguf,
}
EXACT = [kind for kind in QUANTISE if kind != "llm-int8"]  # layers that multiply by the dequantised weight


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16, bias=False))


def base(kind: str, seed: int = 0) -> Any:
    """A fresh quantised model: the same bits for the same kind and seed."""
    model = net(seed)
    QUANTISE[kind](model)
    return model


def dequantised(model: Any) -> nn.Sequential:
    """The same model in float32."""
    plain = net()
    with torch.no_grad():
        for mine, theirs in zip(plain, model, strict=True):
            if isinstance(mine, nn.Linear):
                weight = quantised.quantised_weights(theirs)[id(theirs.weight)]
                mine.weight.copy_(weight.dequantise())
                if mine.bias is not None:
                    mine.bias.copy_(theirs.bias)
            else:
                mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return plain


def stored(model: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of all that the quantised weights store."""
    found = quantised.quantised_weights(model)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[k]: [part.clone() for _, part in sorted(q.stored.parts.items())] for k, q in found.items()}


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None
