"""SM3 over the trained vector: one number for every row and column of the weights instead of one for every entry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from selectune import bits
from selectune.errors import ConfigError
from selectune.train.optim.contract import NewEntries, Positions
from selectune.train.optim.stepping import Stepping
from selectune.train.support.positions import matrix


class SparseSM3(Stepping):
    """SM3 whose entries are the selected scalars of many matrices: v_ij = min(r_i, c_j) + g_ij^2.

    After a step r_i and c_j are the largest v seen in their row and column, and w -= lr g / sqrt(v + eps). Rows and
    columns are those of the weights, which the tuner passes on; without a tuner, and for whole tensors, they are those
    of the parameter. A tensor of more dimensions counts as a matrix of its first by the others, a vector as one row.
    State: one float for every row and column, none per entry; new entries start from min(r_i, c_j).

    Weight decay pulls a selected scalar towards its weight at selection, and whole tensors towards 0.
    SpIEL-MA takes learning rates from 4e-4 to 2e-3. Raises ConfigError for values that make no sense.
    Source: Anil, Gupta, Koren, Singer (2019), Memory-Efficient Adaptive Optimization, arXiv 1901.11150, SM3-II;
    Ansell et al. (2024), arXiv 2401.16405, for sparse entries.

    >>> import torch, selectune as st
    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = st.SparseSM3([weight], lr=1.0, eps=0.0)
    >>> weight.grad = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> optimizer.step()
    >>> weight.tolist(), [x.tolist() for x in optimizer.factors(weight)]
    ([[-1.0, 0.0], [0.0, -1.0]], [[4.0, 1.0], [4.0, 1.0]])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._positions: dict[int, tuple[Tensor, Tensor, tuple[int, int]]] = {}
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for name in ("lr", "eps", "weight_decay"):
                if not float(group[name]) >= 0:
                    raise ConfigError(f"SparseSM3 takes {name} >= 0, but got {name}={group[name]!r}.")

    def place(self, values: Tensor, positions: Positions) -> None:
        """See `optim.contract.Placed`."""
        self._positions[id(values)] = (positions.rows, positions.columns, positions.shape)

    def inherit(self, values: Tensor, new: NewEntries) -> None:
        """See `optim.contract.Inheriting`: there is no state per entry that could be stale."""

    def factors(self, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `optim.contract.Factored`."""
        state = self.state.get(values)
        return (state["rows"], state["columns"]) if state else None

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        positions, state = self._positions.get(id(parameter)), self.state[parameter]
        wide = bits.wide(parameter.dtype)
        shape = matrix(parameter) if positions is None else positions[2]
        if not state:
            state["rows"], state["columns"] = (parameter.new_zeros(n, dtype=wide) for n in shape)
        r, c, g = state["rows"], state["columns"], gradient.to(wide)
        if positions is None:
            g = g.reshape(shape)
            v = torch.minimum(r[:, None], c[None, :]).addcmul(g, g)
            if v.numel():
                r.copy_(v.amax(1))
                c.copy_(v.amax(0))
        else:
            rows, columns, _ = positions
            v = torch.minimum(r[rows], c[columns]).addcmul(g, g)
            r.scatter_reduce_(0, rows, v, "amax")
            c.scatter_reduce_(0, columns, v, "amax")
        values = parameter.detach().to(wide)
        pull = float(group["lr"]) * float(group["weight_decay"])
        if pull:
            values = values - pull * values
        change = torch.where(g == 0, 0.0, g / (v + group["eps"]).sqrt()).reshape(parameter.shape)
        parameter.copy_(values - float(group["lr"]) * change)
