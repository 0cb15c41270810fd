"""One loop, two trainers: the engine and the dense oracle on copies of one model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle import DenseOracle, Entry, Rule, cumulative, d3_scores, front, one_shot, pafi_scores
from torch import Tensor, nn

import selectune as st

EXACT = 1e-12  # what float64 gives: the same sums in another order (1e-6 is promised)
# Adam divides by the gradient's own size, so where a gradient is rounding alone (a key's bias under
# softmax: 1e-17) the rounding is scaled up to about 1e-17 / 1e-8 of a step.
EXACT_ADAM = 1e-9

Optimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Run:
    """What a run left behind: supports after every step, weights at the end."""

    supports: list[set[Entry]]
    weights: list[Tensor]

    @property
    def touched(self) -> set[Entry]:
        return set().union(*self.supports)


@dataclass(frozen=True)
class Plan:
    """One method, as selectune spells it and as the oracle does."""

    method: st.Method
    rule: Rule


def id3(budget: int, steps: int, exp: float = 2.0, eps: float = 1.0, every: int = 1, spread="cumulative") -> Plan:
    quotas = (front if spread == "front" else cumulative)(budget, steps, every)
    method = st.id3(budget=budget, steps=steps, exp=exp, eps=eps, every=every, spread=spread)
    return Plan(method, Rule(d3_scores(exp, eps), quotas, every=every))


def static_d3(budget: int, steps: int = 0, exp: float = 2.0, eps: float = 1.0) -> Plan:
    del steps
    return Plan(st.static_d3(budget=budget, exp=exp, eps=eps), Rule(d3_scores(exp, eps), one_shot(budget)))


def repeat_d3(budget: int, steps: int, exp: float = 2.0, eps: float = 1.0, every: int = 1) -> Plan:
    method = st.repeat_d3(budget=budget, steps=steps, exp=exp, eps=eps, every=every)
    return Plan(method, Rule(d3_scores(exp, eps), [budget] * steps, keeps=False, every=every))


def increment_pafi(budget: int, steps: int, every: int = 1) -> Plan:
    method = st.increment_pafi(budget=budget, steps=steps, every=every)
    return Plan(method, Rule(pafi_scores, cumulative(budget, steps, every), every=every))


def pafi(budget: int, steps: int = 0) -> Plan:
    del steps
    return Plan(st.pafi(budget=budget), Rule(pafi_scores, one_shot(budget)))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)


# -- two trainers, one loop: `batches[step][micro]` is what the model is called with; it returns the loss


def by_oracle(model: nn.Module, plan: Plan, optimizer: Optimizer, batches: Sequence[Sequence[Any]]) -> Run:
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    oracle = DenseOracle(parameters, plan.rule, optimizer(parameters), barred=padding(model))
    for micros in batches:
        for batch in micros:
            (model(batch) / len(micros)).backward()
        oracle.step()
    return Run(oracle.supports, [p.detach() for p in parameters])


def by_engine(model: nn.Module, plan: Plan, optimizer: Optimizer, batches: Sequence[Sequence[Any]]) -> Run:
    model = copy.deepcopy(model)
    number = {name: t for t, (name, _) in enumerate(model.named_parameters())}
    tuner = st.attach(model, plan.method, accumulation_steps=len(batches[0]))
    stepper = optimizer(tuner.parameters())
    supports = []
    for micros in batches:
        for batch in micros:
            (model(batch) / len(micros)).backward()
        stepper.step()
        stepper.zero_grad()
        supports.append({(number[name], i) for name, flat in tuner.support.items() for i in flat.tolist()})
    assert tuner.step == len(batches)
    tuner.verify()
    state = model.state_dict()
    return Run(supports, [state[name].detach() for name in number])


def padding(model: nn.Module) -> set[Entry]:
    """Entries of embedding rows that never get a gradient; they are never selected."""
    rows = {
        id(m.weight): m.padding_idx
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m.padding_idx is not None
    }
    return {
        (t, rows[id(p)] * p.shape[1] + i)
        for t, p in enumerate(model.parameters())
        if id(p) in rows
        for i in range(p.shape[1])
    }


def assert_equal(model: nn.Module, plan: Plan, optimizer: Optimizer, batches: Sequence[Sequence[Any]]) -> Run:
    """The same support after every step, and the same weights; what is outside the support keeps its bits."""
    limit = EXACT_ADAM if optimizer is adamw else EXACT
    ours, reference = (by(model, plan, optimizer, batches) for by in (by_engine, by_oracle))
    for step, (mine, expected) in enumerate(zip(ours.supports, reference.supports, strict=True)):
        assert mine == expected, f"step {step}: too many {mine - expected}, missing {expected - mine}"
    for t, (mine, expected, base) in enumerate(zip(ours.weights, reference.weights, model.parameters(), strict=True)):
        assert bool(expected.isfinite().all()), "this run diverges, so it shows nothing"
        assert float((mine - expected).abs().max()) <= limit, f"tensor {t}"
        frozen = torch.ones(base.numel(), dtype=torch.bool)
        frozen[[i for tensor, i in ours.touched if tensor == t]] = False
        bits = [x.detach().reshape(-1)[frozen].view(torch.int64) for x in (mine, base)]
        assert bool((bits[0] == bits[1]).all()), f"tensor {t}: a frozen scalar moved"
    return ours
