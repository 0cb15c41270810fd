"""IncreLoRA: ranks are added during the run, to the matrices where they count, up to a total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectune.adapters.injected import Injected, Wanted
from selectune.adapters.own.low_rank import LowRank
from selectune.adapters.own.low_rank import put_on as put_low_rank
from selectune.errors import ConfigError
from selectune.train import world

RESERVE = 1e-5
"""The factor of a rank that waits to be added: its vectors are trained already, as the paper has it."""
BETA = 0.85
"""Of both moving averages, as AdaLoRA's code has it."""


class Increlora(LowRank):
    """scale B diag(E) A with `most` ranks, of which the first `rank` are trained; the others' E is 0 or `RESERVE`.

    `seen`: the sum of |dW * dL/dW| since the last step, over the square root of the matrix's size.
    """

    def __init__(self, m: int, n: int, most: int, scale: float) -> None:
        super().__init__(m, n, most, scale, "normal")
        nn.init.normal_(self.A, std=0.02)
        self.E = nn.Parameter(torch.zeros(most))
        with torch.no_grad():
            self.E[:2] = RESERVE
        self.rank, self.seen = most, 0.0
        self.scored = False

    def factors(self) -> tuple[Tensor, Tensor]:
        trained = torch.arange(len(self.E), device=self.E.device) < self.rank
        return self.A, self.scale * self.B * torch.where(trained, self.E, self.E.detach())

    def forward(self, x: Tensor) -> Tensor:  # (..., m) -> (..., n)
        if not (self.scored and self.training and torch.is_grad_enabled()):
            return super().forward(x)
        right, left = self.factors()
        change = left @ right
        change.register_hook(lambda gradient: self._see(change.detach(), gradient))
        return F.linear(x.to(change.dtype), change).to(x.dtype)

    def _see(self, change: Tensor, gradient: Tensor) -> None:
        self.seen += float((change * gradient).abs().sum()) / change.numel() ** 0.5

    @torch.no_grad()
    def reserve(self, finished: bool) -> None:
        """Sets E of the ranks that are not trained: one waits, unless no rank will be added any more."""
        self.E[self.rank :] = 0.0
        if not finished:
            self.E[self.rank : self.rank + 1] = RESERVE


class Growth:
    """Adds ranks between two steps of a run; its state goes into checkpoints.

    After step t, counted from 0, the ranks of n matrices come to n + floor((r - 1) n (t - begin + 1) / (end - begin)),
    so at step end - 1 they are r n exactly. Those with the highest product of both averages get them, one each before
    anyone gets two.
    """

    def __init__(self, sites: Sequence[Increlora], r: int, begin: int, end: int) -> None:
        self.sites, self.r, self.begin, self.end = sites, r, begin, end
        self.averages = torch.zeros(2, len(sites), dtype=torch.float64)  # of the score, and of its change
        for site in sites:
            site.rank, site.scored = 1, True

    def total(self, step: int) -> int:
        """How many ranks there are after a step."""
        n, passed = len(self.sites), min(max(step - self.begin + 1, 0), self.end - self.begin)
        return n + (self.r - 1) * n * passed // (self.end - self.begin)

    def after_step(self, step: int) -> None:
        """Takes in the scores of a step and adds the ranks that are due."""
        seen = torch.tensor([site.seen for site in self.sites], dtype=torch.float64)
        if world.size() > 1:
            shared = seen.to(self.sites[0].E.device, torch.float32)
            torch.distributed.all_reduce(shared)
            seen = shared.to("cpu", torch.float64)
        score, change = self.averages
        score.mul_(BETA).add_(seen, alpha=1 - BETA)
        change.mul_(BETA).add_((seen - score).abs(), alpha=1 - BETA)
        due, finished = self.total(step) - sum(site.rank for site in self.sites), step + 1 >= self.end
        order = (score * change).argsort(descending=True, stable=True).tolist()
        while due > 0:
            for index in [i for i in order if self.sites[i].rank < len(self.sites[i].E)][:due]:
                self.sites[index].rank += 1
                due -= 1
        for site in self.sites:
            site.seen, site.scored = 0.0, not finished
            site.reserve(finished)

    def state_dict(self) -> dict[str, Any]:
        """The ranks, whether scores are still taken, and the averages."""
        info = {"ranks": [site.rank for site in self.sites], "scored": self.sites[0].scored}
        return {"info": info, "tensors": {"averages": self.averages.clone()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`, on the same adapter."""
        self.averages.copy_(state["tensors"]["averages"])
        for site, rank in zip(self.sites, state["info"]["ranks"], strict=True):
            site.rank, site.scored = rank, state["info"]["scored"]


def put_on(wanted: Wanted) -> Injected:
    """Puts them on a model. With `steps`, ranks grow from 1 to a mean of r; without, all are there, for a delta.

    Raises ConfigError if `begin` and `end` leave no step, or if `most` is below r.
    """
    o, steps = wanted.options, wanted.steps
    if o["most"] < max(2, o["r"]):
        raise ConfigError(f"increlora: most={o['most']} is below {max(2, o['r'])}; a matrix may have most ranks.")
    put, sites = put_low_rank(wanted, lambda m, n, o: Increlora(m, n, o["most"], o["alpha"] / o["r"]))
    if steps is not None:
        begin, end = int(o["begin"] * steps), steps - max(1, int(o["end"] * steps))
        if begin >= end:
            put.remove()
            raise ConfigError(
                f"increlora: begin={o['begin']} and end={o['end']} leave none of {steps} steps in which ranks could be "
                "added. Lower one of them, or train longer."
            )
        growth = Growth(sites, o["r"], begin, end)
        put.after_step, put.kept = growth.after_step, growth
    return put
