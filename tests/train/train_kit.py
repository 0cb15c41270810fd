"""Small models that together have every kind of parameter, and plain loops over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Mixed(nn.Module):
    """Embedding with padding, tied head, linear, convolution, norm, attention, LSTM, 0-d, 3-d, strided, unused."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.table = nn.Embedding(6, 8, padding_idx=2)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.experts = nn.Parameter(torch.randn(2, 8, 8) / 3)
        self.strided = nn.Parameter((torch.randn(8, 8) / 3).t())
        self.unused = nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:  # (b, t) -> (b, t, 20)
        h = self.embed(x) + self.table(x % 6)
        h = h + self.linear(h).tanh()
        h = h + self.conv(h.mT).mT
        h = self.norm(h) * self.scale
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + self.rnn(h)[0]
        # The second expert counts for more: with equal gradients, their order would be decided by rounding.
        h = h + (h @ self.experts[0] + 1.25 * (h @ self.experts[1])).tanh() + h @ self.strided
        return self.head(h)


class Blocks(nn.Module):
    """Linear blocks, optionally under activation checkpointing of either kind."""

    def __init__(self, mode: str = "none", depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1)) for _ in range(depth))
        self.shared = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            run: Callable[[Tensor], Tensor] = lambda h, block=block: self.shared(block(h))  # noqa: E731
            h = run(h) if self.mode == "none" else checkpoint(run, h, use_reentrant=self.mode == "reentrant")
        return self.last(h)


def tokens(seed: int = 0, n: int = 4, t: int = 5) -> Tensor:
    return torch.randint(0, 20, (n, t), generator=torch.Generator().manual_seed(seed))


def mixed_loss(model: nn.Module, x: Tensor, temperature: float = 1.0) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1).double() / temperature, x.flatten())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> Iterator[int]:
    """The ordinary loop on a `Mixed` model; yields after every step."""
    for step in range(start, start + count):
        optimizer.zero_grad()
        mixed_loss(model, tokens(step)).backward()
        optimizer.step()
        yield step


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer as integers, by name."""
    whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {n: t.detach().clone().contiguous().view(-1).view(widths[t.element_size()]) for n, t in whole.items()
            if "selectune_" not in n}  # fmt: skip


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(bool((a[n] == b[n]).all()) for n in a)


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, set[int]]:
    """Flat indices that differ, by tensor; tensors that do not differ are left out."""
    found = {n: set((a[n] != b[n]).nonzero().flatten().tolist()) for n in a}
    return {n: where for n, where in found.items() if where}
