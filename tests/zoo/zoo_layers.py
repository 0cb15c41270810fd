"""Odd modules, first half: torch's own layers, each with an activation in place behind it, and what torch puts on them."""

# ruff: noqa: E501 - a row a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo_kit import Row, impossible, of_output


def floats(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """One float64 input that asks for its gradient, as inner activations do."""
    return lambda draw: (torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_(),)


def ids(*shape: int, below: int = 12) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def batch(draw: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randint(0, below, shape, generator=draw),)

    return batch


def row(name: str, make: Callable[[], nn.Module], batch: Callable[[torch.Generator], Any], **more: Any) -> Row:
    """A row of an odd module. Reentrant checkpointing around it needs an input that asks for its gradient."""
    expects = dict(more.pop("expects", {}))
    if not any(part.requires_grad for part in batch(torch.Generator())):
        expects.setdefault("reentrant", impossible("does not require grad"))
    return Row(name, make, batch, more.pop("loss", of_output), expects, **{"short": True, "share": 0.4, **more})


class Through(nn.Module):
    """A layer between two linear ones, with an activation in place right behind it."""

    def __init__(self, layer: nn.Module, before: int, after: int, act: str = "relu_") -> None:
        super().__init__()
        self.first, self.layer, self.last, self.act = nn.Linear(6, before), layer, nn.Linear(after, 3), act

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.first(x))
        h = h[0] if isinstance(h, tuple) else h
        return self.last(getattr(torch, self.act)(h))


class Images(nn.Module):
    """Convolutional layers and an activation in place behind each."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.nn.functional.leaky_relu(layer(x), inplace=True)
        return x.flatten(2).mean(-1)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x)
        return self.out(torch.tanh_(y)), weights


class Last(nn.Module):
    """A recurrent layer's outputs, its last states left out."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.plain = nn.LSTMCell(6, 5), nn.GRUCell(5, 5), nn.RNNCell(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 5)
        for _ in range(2):
            h, c = self.lstm(x, (h, c))
            h = self.plain(self.gru(h, c), h)
        return h


class Words(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.out = table, nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh_(self.table(tokens)))


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(12, 8, mode=mode, padding_idx=0), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.bag(tokens))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.out = nn.Bilinear(6, 6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bilinear(x, x.flip(0)).sigmoid_())


class Nothing(nn.Module):
    """Layers of width 0 beside one that has a width."""

    def __init__(self) -> None:
        super().__init__()
        self.empty, self.back, self.real = nn.Linear(6, 0), nn.Linear(0, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.real(x) + self.back(self.empty(x))


def stacked(layer: nn.Module, **options: Any) -> nn.Module:
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, **options)


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)


class Translate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, x.flip(1))


def in_place_chain() -> nn.Module:
    kinds = (nn.ReLU, nn.SiLU, nn.ELU, nn.Hardswish, nn.LeakyReLU)
    return nn.Sequential(*(part for kind in kinds for part in (nn.Linear(6, 6), kind(inplace=True))))


# its power iteration goes one step on in a repeated forward
POWER = dict.fromkeys(("reentrant", "nonreentrant"), impossible("the gradient is not that of the plain run"))

ROWS = [
    row("linear, relu in place, 1-d input", lambda: Through(nn.Linear(8, 8), 8, 8), floats(6)),
    row("linear, relu in place, 2-d input", lambda: Through(nn.Linear(8, 8), 8, 8), floats(5, 6)),
    row("linear, tanh in place, 3-d input", lambda: Through(nn.Linear(8, 8), 8, 8, "tanh_"), floats(2, 5, 6)),
    row("linear without bias, in place", lambda: Through(nn.Linear(8, 8, bias=False), 8, 8), floats(2, 5, 6)),
    row("linear layers and every activation in place", in_place_chain, floats(2, 4, 6)),
    row("layer norm, in place", lambda: Through(nn.LayerNorm(8), 8, 8), floats(2, 5, 6)),
    row("layer norm without affine", lambda: Through(nn.LayerNorm(8, elementwise_affine=False), 8, 8), floats(5, 6)),
    row("layer norm without bias", lambda: Through(nn.LayerNorm(8, bias=False), 8, 8), floats(5, 6)),
    row("layer norm over two axes", lambda: nn.Sequential(nn.LayerNorm((5, 6)), nn.Linear(6, 3)), floats(2, 5, 6)),
    row("rms norm, in place", lambda: Through(nn.RMSNorm(8), 8, 8), floats(2, 5, 6)),
    row("batch norm, in place", lambda: Through(nn.BatchNorm1d(8), 8, 8), floats(5, 6)),
    row("prelu", lambda: Through(nn.PReLU(8), 8, 8), floats(5, 6)),
    row("conv1d", lambda: Images(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 3, groups=2)), floats(2, 3, 9)),
    row("conv2d", lambda: Images(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), floats(2, 3, 6, 6)),
    row("conv3d", lambda: Images(nn.Conv3d(2, 3, 2), nn.InstanceNorm3d(3, affine=True)), floats(2, 2, 4, 4, 4)),
    row("conv transposed", lambda: Images(nn.ConvTranspose2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2)), floats(2, 3, 4, 4)),
    row("lazy linear, made real", lambda: _real(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3))), floats(4, 6)),
    row("multi-head attention", Attention, floats(2, 5, 8)),
    row("multi-head attention with bias_kv", lambda: Attention(add_bias_kv=True, add_zero_attn=True), floats(2, 5, 8)),
    row("multi-head attention, other widths", lambda: Attention(kdim=8, vdim=8, bias=False), floats(2, 5, 8)),
    row("transformer encoder layer", encoder, floats(2, 5, 8)),
    row("transformer encoder layer, norm first", lambda: encoder(norm_first=True, activation="gelu"), floats(2, 5, 8)),
    row("transformer encoder", lambda: stacked(encoder()), floats(2, 5, 8)),
    row("transformer decoder layer", Translate, floats(2, 5, 8)),
    row("lstm", lambda: Last(nn.LSTM(6, 5, 2, batch_first=True), 5), floats(2, 4, 6)),
    row("lstm, both ways, projected", lambda: Last(nn.LSTM(6, 5, bidirectional=True, proj_size=4), 8), floats(4, 2, 6)),
    row("gru, both ways", lambda: Last(nn.GRU(6, 5, bidirectional=True), 10), floats(4, 2, 6)),
    row("rnn with relu", lambda: Last(nn.RNN(6, 5, nonlinearity="relu"), 5), floats(4, 2, 6)),
    row("cells", Cells, floats(3, 6)),
    row("embedding with padding", lambda: Words(nn.Embedding(12, 8, padding_idx=0)), ids(3, 5)),
    row("embedding scaled by frequency", lambda: Words(nn.Embedding(12, 8, scale_grad_by_freq=True)), ids(3, 5)),
    row("embedding bag, sum", lambda: Bag("sum"), ids(3, 5)),
    row("embedding bag, mean", lambda: Bag("mean"), ids(3, 5)),
    row("embedding bag, max", lambda: Bag("max"), ids(3, 5)),
    row("bilinear", Pairs, floats(4, 6)),
    row("width 0", Nothing, floats(4, 6)),
    row("weight norm", lambda: Through(parametrizations.weight_norm(nn.Linear(8, 8)), 8, 8), floats(5, 6)),
    row("weight norm, the old one", lambda: Through(_old_weight_norm(), 8, 8), floats(5, 6)),
    row("spectral norm", lambda: Through(parametrizations.spectral_norm(nn.Linear(8, 8)), 8, 8), floats(5, 6), expects=POWER),
    row("orthogonal", lambda: Through(parametrizations.orthogonal(nn.Linear(8, 8)), 8, 8), floats(5, 6), expects={"bf16": impossible("not finite")}),
]  # fmt: skip


def _old_weight_norm() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(8, 8))


def _real(model: nn.Module) -> nn.Module:
    model(torch.zeros(1, 6))
    return model
