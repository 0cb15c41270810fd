"""The base for a while: the trained values leave the model in training, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from selectune.errors import TunerError
from selectune.internals import versions_kept
from selectune.scope import ScopedTensor
from selectune.train.support.proof import BaseCopy
from selectune.train.tracker import Tracker


class Aside:
    """What the model of a run has beyond its base: taken off as this is made, put back by `back`.

    Entries that a schedule has dropped keep their trained values, so they leave and come back too. In between, the
    tracker rests: forward passes compute with the base, as torch does without a tuner, and select nothing.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[ScopedTensor],
        whole: Sequence[ScopedTensor],
        base: BaseCopy,
        tracker: Tracker,
    ) -> None:
        self.tracker, ledger, dense = tracker, tracker.ledger, tracker.chooser.dense
        ledger.follow()
        buffers = [buffer for name, buffer in model.named_buffers() if name in base.buffers]
        filled = [t.weight for t in tensors if t.name in base.filled]
        self._copies = [(tensor, tensor.clone()) for tensor in (*(t.weight for t in whole), *filled, *buffers)]
        self._entries = [] if dense else [page.touched()[0] for page in ledger.pages]
        self._values = [ledger.store.read(index, flat) for index, flat in enumerate(self._entries)]
        self._offsets, self._behind = ledger.offsets.detach().clone(), not dense and bool(ledger.strays())
        self._versions = ExitStack()
        written = [t.weight for t in tensors if t.quantised is None]
        # a graph made before may go back after: its weights then have the same bits again
        self._versions.enter_context(versions_kept((*written, *(tensor for tensor, _ in self._copies))))
        tracker.away = tracker.taps.asleep = True
        ledger.write_base()
        base.restore(model)

    @torch.no_grad()
    def back(self) -> None:
        """Puts the trained values back."""
        tracker, ledger = self.tracker, self.tracker.ledger
        ledger.follow()
        for tensor, copy in self._copies:
            tensor.copy_(copy)
        for index, (flat, values) in enumerate(zip(self._entries, self._values, strict=True)):
            touched = ledger.pages[index].touched()[0]
            flat, values = flat.to(touched.device), values.to(touched.device)
            kept = torch.isin(flat, touched)  # a selection that was undone meanwhile has left its entries to the base
            ledger.store.write(index, flat[kept], values[kept])
        moved = not torch.equal(ledger.offsets.detach(), self._offsets.to(ledger.offsets.device))
        if self._entries and (moved or not self._behind):  # else the weights do not follow the offsets yet
            ledger.write_weights()
        tracker.away, tracker.taps.asleep = False, tracker.chooser.dense
        self._versions.close()

    def leave(self) -> None:
        """The tuner is off and its model the base: nothing comes back."""
        self._versions.close()


def refuse_away(tracker: Tracker, what: str) -> None:
    """Raises TunerError if the trained values are off the model now."""
    if tracker.away:
        raise TunerError(
            f"{what} while the adapter is disabled: the model has its base's weights then, and its trained values lie "
            "aside. Enable the adapter first, or leave the block of disable_adapter()."
        )
