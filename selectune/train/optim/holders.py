"""Finds the optimizers that hold the vector of offsets: torch's hooks report their steps, so none is guessed."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn


def held(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of all parameters of an optimizer."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class Holders:
    """The known optimizers with torch's hooks that hold a vector."""

    def __init__(self, offsets: nn.Parameter) -> None:
        self._offsets = offsets
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._looked = False  # whether all objects were searched once

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes an optimizer that holds the vector and has stepped."""
        self._known.add(optimizer)

    def any(self) -> bool:
        """Whether there is one. An optimizer that has not stepped yet is searched for once, among all live objects."""
        if not self._looked and not self._known:
            self._looked = True
            for one in gc.get_objects():
                if issubclass(type(one), torch.optim.Optimizer) and id(self._offsets) in held(one):
                    self._known.add(one)
        return bool(self._known)
