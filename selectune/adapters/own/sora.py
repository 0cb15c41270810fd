"""SoRA: a gate on each rank of LoRA, which proximal steps close."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selectune.adapters.injected import Injected, Wanted
from selectune.adapters.own.low_rank import LowRank
from selectune.adapters.own.low_rank import put_on as put_low_rank


class Sora(LowRank):
    """scale B diag(g) A, g (r,): a rank whose gate is 0 takes no part."""

    def __init__(self, m: int, n: int, r: int, scale: float = 1.0, init: str = "zero") -> None:
        super().__init__(m, n, r, scale, init)
        self.gate = nn.Parameter(torch.ones(r))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.gate[:, None] * self.A, self.scale * self.B


def shrink(gate: Tensor, xi: float) -> Tensor:
    """sign(g) max(|g| - xi, 0): the proximal step of xi |g|.

    Source: Ding et al. (2023), SoRA, arXiv 2311.11696.

    >>> shrink(torch.tensor([2.5, 1.5, -0.5]), 1.0).tolist()
    [1.5, 0.5, 0.0]
    """
    return gate - gate.clamp(-xi, xi)


def put_on(wanted: Wanted) -> Injected:
    """Puts gated low-rank changes on a model. With `steps`, a proximal step follows each step of the optimizer."""
    put, sites = put_low_rank(wanted, lambda m, n, o: Sora(m, n, o["r"], o["alpha"] / o["r"], o["init"]))

    @torch.no_grad()
    def after_step(step: int) -> None:
        del step
        for site in sites:
            site.gate.copy_(shrink(site.gate, wanted.options["xi"]))

    if wanted.steps is not None:
        put.after_step = after_step
    return put
