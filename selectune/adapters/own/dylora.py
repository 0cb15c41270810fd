"""DyLoRA: one run gives a LoRA that can be cut to any lower rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selectune.adapters.injected import Injected, Wanted
from selectune.adapters.own.low_rank import LowRank
from selectune.adapters.own.low_rank import put_on as put_low_rank
from selectune.errors import ConfigError


class Dylora(LowRank):
    """(alpha / b) B[:, :b] A[:b]: in training b is the drawn rank, else the one that `at_rank` chose, r at first."""

    def __init__(self, m: int, n: int, r: int, alpha: float, init: str, frozen: bool) -> None:
        super().__init__(m, n, r, alpha, init)
        self.drawn = self.chosen = r
        self.frozen = frozen

    def factors(self) -> tuple[Tensor, Tensor]:
        b = self.drawn if self.training else self.chosen
        right, left = self.A[:b], self.B[:, :b]
        if self.frozen and self.training and b > 1:  # the ranks below b were trained when they were drawn
            right = torch.cat((right[:-1].detach(), right[-1:]))
            left = torch.cat((left[:, :-1].detach(), left[:, -1:]), dim=1)
        return right, (self.scale / b) * left


def put_on(wanted: Wanted) -> Injected:
    """Puts them on a model, which then draws one rank from 1 to r for each forward pass in training.

    The draw is torch's, as that of dropout is, so checkpoints of a run restore it.
    """
    put, sites = put_low_rank(
        wanted, lambda m, n, o: Dylora(m, n, o["r"], o["alpha"], o["init"], o["frozen"])
    )  # fmt: skip
    handle, remove, merge = wanted.model.register_forward_pre_hook(_Draw(sites)), put.remove, put.merge

    def off() -> None:
        handle.remove()
        remove()

    def fold() -> None:
        handle.remove()
        if merge is not None:
            merge()

    put.remove, put.merge = off, fold
    return put


class _Draw:
    """Draws the rank of a forward pass. As an object, it is copied with the model, together with its sites."""

    def __init__(self, sites: Sequence[Dylora]) -> None:
        self.sites = sites

    def __call__(self, module: nn.Module, args: Any) -> None:
        del args
        if module.training:
            b = int(torch.randint(1, self.sites[0].A.shape[0] + 1, ()))
            for site in self.sites:
                site.drawn = b


def at_rank(model: nn.Module, rank: int) -> None:
    """Uses the first `rank` ranks of the model's DyLoRA from now on, outside training.

    Raises ConfigError if the model has none, or if the rank is not from 1 to the one that it was put on with.
    Source: Valipour et al. (2023), DyLoRA, arXiv 2210.07558.
    """
    sites = [module for module in model.modules() if isinstance(module, Dylora)]
    if not sites:
        raise ConfigError(f"{type(model).__name__} carries no dylora, so it has no rank to choose.")
    most = sites[0].A.shape[0]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ConfigError(f"rank={rank!r}: must be an int from 1 to {most}, the r of this dylora.")
    for site in sites:
        site.chosen = rank
