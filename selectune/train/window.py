"""A window: what makes one optimizer step, and what has become of its gradient since."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selectune.bits import wide
from selectune.frames import Call
from selectune.scope import ScopedTensor
from selectune.train.graph.own_hooks import weakly
from selectune.train.ledger import Snapshot

log = logging.getLogger("selectune")


@dataclass
class Clock:
    """How many optimizer steps a run has taken, and whether one is being taken now."""

    step: int = 0
    call: Call | None = None  # the running optimizer.step(), where a closure may run backward again

    @property
    def in_step(self) -> bool:
        """Whether optimizer.step() is running."""
        return self.call is not None and not self.call.over()


@dataclass
class Window:
    """What is known of the present step, from its first backward pass to its commit."""

    backwards: int = 0
    reads: int = 0  # backward passes, from the first on, whose dense gradients are wanted
    closed: bool = False  # the selection of this window is done
    held: dict[int, Tensor] = field(default_factory=dict)  # dense sums, while more is to come for them
    before: Snapshot | None = None  # the ledger before this window's selection
    gradient: Tensor | None = None  # (B,) what the window gave so far, kept under accumulation only
    expected: Tensor | None = None  # (B,) what the optimizer will find, unless it is scaled; kept while watching
    left: tuple[int, int] | None = None  # where the gradient lies, and its version, as autograd left it
    watched: dict[int, Tensor] = field(default_factory=dict)  # gradients of watched entries in this backward pass
    scale: float = 1.0  # what clipping and unscaling made of the gradient

    @property
    def selects(self) -> bool:
        """Whether the present backward pass is read by a selection."""
        return self.reads > 0 and not self.closed

    def hold(self, tensor: ScopedTensor, gradient: Tensor, rows: Tensor | None) -> None:
        """Adds a dense gradient, or the given rows of one, to the sum that is kept for a tensor."""
        dtype, total = wide(tensor.parameter.dtype), self.held.get(tensor.index)
        if total is None:
            whole = gradient.to(dtype, copy=True) if rows is None else scattered(gradient.to(dtype), rows, tensor)
            self.held[tensor.index] = whole
        elif rows is None:
            total.add_(gradient)
        else:
            total.index_add_(0, rows, gradient.to(dtype))

    def keep_track(self, gradient: Tensor | None) -> None:
        """Autograd has added to the gradient (B,) that the optimizer will find."""
        if gradient is not None:
            self.left = (gradient.data_ptr(), gradient._version)

    def lost(self, gradient: Tensor | None, selected: int) -> bool:
        """Whether what autograd left there is gone: set to None, or to 0.

        A gradient that is 0 because nothing was selected yet looks like one set to 0, and is taken for the former.
        """
        if self.left is None or self.backwards == 0:
            return False
        if gradient is None:
            return True
        return (gradient.data_ptr(), gradient._version) != self.left and selected > 0 and not bool(gradient.any())


def scattered(block: Tensor, rows: Tensor, tensor: ScopedTensor) -> Tensor:
    """Rows of a gradient as the dense gradient they stand for."""
    dense = block.new_zeros(tensor.parameter.shape)
    return dense.index_copy_(0, rows, block)


def scale_between(then: Tensor | None, now: Tensor) -> float:
    """What clipping or unscaling multiplied the gradient by since backward; 1 where that cannot be seen."""
    if then is None or not bool(then.any()):
        return 1.0
    at = int(then.abs().argmax())
    scale = float(now[at] / then[at])
    return scale if math.isfinite(scale) else 1.0


class OtherWays:
    """Whether the offsets get gradients by another way than the weights: a loss that depends on the vector itself."""

    def __init__(self, offsets: Tensor) -> None:
        self._sent: list[Tensor] = []
        self._said = False
        offsets.register_hook(weakly(self._arrived))

    def sends(self, gradient: Tensor) -> Tensor:
        """The gradient, which autograd is about to add to the offsets'."""
        self._sent.append(gradient)
        return gradient

    def _arrived(self, gradient: Tensor) -> None:
        sent, self._sent = self._sent, []
        if not self._said and not _is_sum(gradient, sent):
            self._said = True
            log.warning(
                "The loss depends on the tuner's own vector of offsets, not only on the weights. A penalty over "
                "tuner.parameters() pulls towards the base, and that is its gradient. A penalty over all of "
                "model.parameters() counts the offsets beside the weights: leave the vector out, which is the last."
            )


def _is_sum(gradient: Tensor, parts: Sequence[Tensor]) -> bool:
    if len(parts) == 1 and gradient.data_ptr() == parts[0].data_ptr():
        return True
    total = sum(parts) if parts else gradient.new_zeros(())
    return bool(torch.allclose(gradient, torch.as_tensor(total).expand_as(gradient), equal_nan=True))
