"""The step() that our own optimizers share: one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selectune.errors import ConfigError


class Stepping(torch.optim.Optimizer):
    """An optimizer whose `_step` updates one parameter that has a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step; `closure`, if given, computes the loss again first and is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and gradient.is_sparse:
                    raise ConfigError(f"{type(self).__name__} takes dense gradients, but got a sparse tensor.")
                if gradient is not None:
                    self._step(parameter, gradient, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError
