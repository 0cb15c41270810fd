"""A window: what makes one optimizer step, and what happened to its gradient since backward."""

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
from selectune.train.support.ledger import Snapshot

log = logging.getLogger("selectune")


@dataclass
class Clock:
    """How many optimizer steps a run has taken, and whether it is taking one now."""

    step: int = 0
    call: Call | None = None  # the running optimizer.step(), whose closure may run backward again

    @property
    def in_step(self) -> bool:
        """Whether optimizer.step() is running."""
        return self.call is not None and not self.call.over()


@dataclass
class Window:
    """The present step, from its first backward pass to its commit."""

    backwards: int = 0  # passes that have ended
    reads: int = 0  # how many passes, from the first on, show their dense gradients
    closed: bool = False  # the selection of this window is done
    sums: dict[int, Tensor] = field(default_factory=dict)  # dense gradients of tensors that still expect more of them
    kept: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # dy and x of gradients not formed yet
    before: Snapshot | None = None  # the ledger before this window's selection
    gradient: Tensor | None = None  # (B,) the sum of the passes so far; kept under accumulation only
    expected: Tensor | None = None  # (B,) what the optimizer finds unless it is scaled; kept while entries are watched
    left: tuple[int, int] | None = None  # address and version of the gradient as autograd left it
    watched: dict[int, Tensor] = field(default_factory=dict)  # gradients of watched entries in this backward pass
    scale: float = 1.0  # the factor by which clipping and unscaling changed the gradient

    @property
    def selects(self) -> bool:
        """Whether a selection reads the present backward pass."""
        return self.reads > 0 and not self.closed

    def add(self, tensor: ScopedTensor, gradient: Tensor, rows: Tensor | None) -> None:
        """Adds a dense gradient, or the given rows of one, to the sum of a tensor."""
        dtype, total = wide(tensor.form.dtype), self.sums.get(tensor.index)
        if total is None:
            dense = gradient.to(dtype, copy=True) if rows is None else scattered(gradient.to(dtype), rows, tensor)
            self.sums[tensor.index] = dense
        elif rows is None:
            total.add_(gradient)
        else:
            total.index_add_(0, rows, gradient.to(dtype))

    def keep(self, index: int, dy: Tensor, x: Tensor) -> bool:
        """Keeps a pass's gradient dy^T x as its factors, while all of them take no more than the sum would."""
        tokens = dy.shape[0] + sum(part[0].shape[0] for part in self.kept.get(index, ()))
        if index in self.sums or tokens * (dy.shape[1] + x.shape[1]) > dy.shape[1] * x.shape[1]:
            return False
        self.kept.setdefault(index, []).append((dy.detach().clone(), x.detach().clone()))
        return True

    def together(self, index: int) -> tuple[Tensor, Tensor]:
        """The kept factors of a tensor, the tokens of all passes one after the other; they are kept no longer."""
        left, right = zip(*self.kept.pop(index), strict=True)
        return torch.cat(left), torch.cat(right)

    def keep_track(self, gradient: Tensor | None) -> None:
        """Remembers the gradient (B,) that autograd has just added to."""
        if gradient is not None:
            self.left = (gradient.data_ptr(), gradient._version)

    def lost(self, gradient: Tensor | None, selected: int) -> bool:
        """Whether the gradient that autograd left was since set to None or to 0.

        While nothing is selected the gradient is 0 anyway, so a 0 says nothing then.
        """
        if self.left is None or self.backwards == 0:
            return False
        if gradient is None:
            return True
        return (gradient.data_ptr(), gradient._version) != self.left and selected > 0 and not bool(gradient.any())


def scattered(block: Tensor, rows: Tensor, tensor: ScopedTensor) -> Tensor:
    """The dense gradient of a tensor out of the rows that are not 0."""
    dense = block.new_zeros(tensor.form.shape)
    return dense.index_copy_(0, rows, block)


def scale_between(then: Tensor | None, now: Tensor) -> float:
    """The factor by which clipping or unscaling changed a gradient; 1 if that cannot be seen."""
    if then is None or not bool(then.any()):
        return 1.0
    at = int(then.abs().argmax())
    scale = float(now[at] / then[at])
    return scale if math.isfinite(scale) else 1.0


class PenaltyWatch:
    """Warns once if the offsets get gradients that did not come through the weights: from a penalty over them, say."""

    def __init__(self, offsets: Tensor) -> None:
        self._sent: list[Tensor] = []
        self._warned = False
        offsets.register_hook(weakly(self._arrived))

    def sends(self, gradient: Tensor) -> Tensor:
        """Takes note of a gradient that autograd is about to add to the offsets'; returns it."""
        self._sent.append(gradient)
        return gradient

    def _arrived(self, gradient: Tensor) -> None:
        sent, self._sent = self._sent, []
        if not self._warned and not _is_sum(gradient, sent):
            self._warned = True
            log.warning(
                "The loss depends on the tuner's own vector of offsets, not only on the weights. A penalty over "
                "tuner.parameters() pulls towards the base. A penalty over all of model.parameters() counts the "
                "offsets in addition to the weights; leave out the vector, which is the last parameter."
            )


def _is_sum(gradient: Tensor, parts: Sequence[Tensor]) -> bool:
    if len(parts) == 1 and gradient.data_ptr() == parts[0].data_ptr():
        return True
    total = sum(parts) if parts else gradient.new_zeros(())
    return bool(torch.allclose(gradient, torch.as_tensor(total).expand_as(gradient), equal_nan=True))
