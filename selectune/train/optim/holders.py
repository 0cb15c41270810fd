"""Which optimizers hold the vector of offsets: where torch's hooks tell of steps, none has to be guessed."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn


def held(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of all parameters of an optimizer."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class Holders:
    """The optimizers with torch's hooks that hold a vector, as far as they were seen."""

    def __init__(self, offsets: nn.Parameter) -> None:
        self._offsets = offsets
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._looked = False  # for one that holds the offsets and has not stepped yet

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that holds the vector has stepped."""
        self._known.add(optimizer)

    def any(self) -> bool:
        """Whether there is one; one that has not stepped yet is looked for once, among all objects that live."""
        if not self._looked and not self._known:
            self._looked = True
            for found in gc.get_objects():
                if issubclass(type(found), torch.optim.Optimizer) and id(self._offsets) in held(found):
                    self._known.add(found)
        return bool(self._known)
