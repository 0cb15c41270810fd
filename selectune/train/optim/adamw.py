"""AdamW over the trained vector in one pass, on request with an age of its own for every entry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from selectune import bits, ops
from selectune.errors import ConfigError
from selectune.train.optim.contract import NewEntries
from selectune.train.optim.stepping import Stepping

AGES = ("shared", "entry")


class SparseAdamW(Stepping):
    """AdamW whose bias correction counts steps per optimizer ("shared", torch's way) or per entry ("entry").

    An entry that is selected late has moments of 0 but, with a shared count, no bias correction left,
    so its first step is up to 3.16 times the learning rate. With `age="entry"` the first step of every
    entry is one learning rate, whenever it is selected; an entry waits, untouched by weight decay too,
    for its first gradient that is not 0. State: two floats per entry, and an int32 with `age="entry"`.
    `age="shared"` equals torch.optim.AdamW within rounding.

    Weight decay pulls a selected scalar towards its weight at selection (the vector holds offsets from it), and whole
    tensors towards 0. (SpIEL's grid of `weight_decay` is 1, 3, 10, 30, at learning rates of about 1e-5.) An entry that
    takes over a slot starts from moments of 0. If its gradients were watched before, it starts from their mean and
    mean square: m = mean (1 - b1^age), v = mean square (1 - b2^age), which bias correction turns back into these.
    Raises ConfigError for values that make no sense.
    Source: Loshchilov and Hutter (2019), arXiv 1711.05101; Ansell et al. (2024), arXiv 2401.16405, for watched entries.

    >>> import torch
    >>> values = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = SparseAdamW([values], lr=0.1, age="entry", weight_decay=0.0)
    >>> for gradient in ([5.0, 0.0], [5.0, 0.0], [5.0, 1.0]):
    ...     values.grad = torch.tensor(gradient)
    ...     optimizer.step()
    >>> [round(v, 4) for v in values.tolist()]
    [-0.3, -0.1]
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        age: str = "shared",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "age": age}
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict; moments and ages keep their dtypes, which torch would cast to the parameter's."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            _check(group)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                kept = value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                self.state[parameter][name] = kept

    @torch.no_grad()
    def inherit(self, values: Tensor, new: NewEntries) -> None:
        """See `optim.contract.Inheriting`."""
        group = self._group(values)
        if not self.state[values]:
            if new.mean is None:
                return
            self._begin(values, group)
        state, slots = self.state[values], new.slots
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m[slots] = v[slots] = 0
        if "age" in state:
            state["age"][slots] = 0 if new.mean is None else new.age
        if new.mean is not None and new.square is not None:
            age = new.age if "age" in state else int(state["step"])
            m[slots] = new.mean.to(m) * (1 - group["betas"][0] ** age)
            v[slots] = new.square.to(v) * (1 - group["betas"][1] ** age)

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, wide = self.state[parameter], bits.wide(parameter.dtype)
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
        if group["age"] == "entry":
            state["age"] = torch.zeros_like(parameter, dtype=torch.int32)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, group)
        state["step"] += 1
        m = state["exp_avg"]
        ages = state["age"] if group["age"] == "entry" else None
        values = parameter.detach().to(m.dtype)  # the parameter itself unless it is a half
        ops.adamw_step(
            values, gradient.to(m.dtype), m, state["exp_avg_sq"], ages, step=int(state["step"]),
            lr=float(group["lr"]), betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip
        if values.dtype != parameter.dtype:
            parameter.copy_(values)


def _check(group: dict[str, Any]) -> None:
    first, second = group["betas"]
    fine = {
        "lr >= 0": float(group["lr"]) >= 0,
        "betas in [0, 1)": 0 <= first < 1 and 0 <= second < 1,
        "eps >= 0": group["eps"] >= 0,
        "weight_decay >= 0": group["weight_decay"] >= 0,
        f"age in {', '.join(AGES)}": group["age"] in AGES,
    }
    for rule, holds in fine.items():
        if not holds:
            got = group[rule.split()[0]]
            raise ConfigError(f"SparseAdamW takes {rule}, but got {rule.split()[0]}={got!r}.")
