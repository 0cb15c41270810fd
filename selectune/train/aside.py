"""The base for a while: the trained values leave the model in training, and come back bit for bit."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from selectune.errors import TunerError
from selectune.internals import versions_kept
from selectune.train.tracker import Tracker

if TYPE_CHECKING:
    from selectune.train.engine import Engine


class Aside:
    """What the model of a run has beyond its base: taken off as this is made, put back by `back`.

    Entries that a schedule has dropped keep their trained values, so they leave and come back too. In between, the
    tracker rests: forward passes compute with the base, as torch does without a tuner, and select nothing.
    """

    @torch.no_grad()
    def __init__(self, engine: Engine) -> None:
        self.engine, ledger, base, dense = engine, engine.ledger, engine.base, engine.chooser.dense
        ledger.follow()
        buffers = [buffer for name, buffer in engine.model.named_buffers() if name in base.buffers]
        whole = [t.weight for t in engine.now.whole]
        filled = [t.weight for t in engine.found.tensors if t.name in base.filled]
        self._copies = [(tensor, tensor.clone()) for tensor in (*whole, *filled, *buffers)]
        self._entries = [] if dense else [page.touched()[0] for page in ledger.pages]
        self._values = [ledger.store.read(index, flat) for index, flat in enumerate(self._entries)]
        self._offsets, self._behind = ledger.offsets.detach().clone(), not dense and bool(ledger.strays())
        self._versions = ExitStack()
        written = [t.weight for t in engine.found.tensors if t.quantised is None]
        # a graph made before may go back after: its weights then have the same bits again
        self._versions.enter_context(versions_kept((*written, *(tensor for tensor, _ in self._copies))))
        engine.tracker.away = engine.tracker.taps.asleep = True
        ledger.write_base()
        base.restore(engine.model)

    @torch.no_grad()
    def back(self) -> None:
        """Puts the trained values back."""
        tracker, ledger = self.engine.tracker, self.engine.ledger
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
        tracker.away, tracker.taps.asleep = False, self.engine.chooser.dense
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
