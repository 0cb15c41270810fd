"""The door to a model's weights: threads that read or write them take turns, in the order in which they ask.

A *hold* is one thread's turn at one model. Many threads may read at a time (shared holds); a thread that writes is
alone. Holds compete for memory, not for a name: two models exclude each other if one is a part of the other or if they
share a weight (`Claim`). One lock guards the two lists below; no thread has it while it touches weights.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor, nn

from selectune.delta.file.fingerprint import own_tensors
from selectune.errors import ConfigError, DeltaStateError, DeltaTimeoutError


@dataclass(frozen=True, eq=False)
class Claim:
    """The modules of a model and its memory."""

    things: frozenset[int]  # ids of the model, of its modules that have tensors, of tensors without an address
    spans: tuple[tuple[int, int], ...]  # addresses of the tensors' memory, (first, behind the last), rising

    def meets(self, other: Claim) -> bool:
        """Whether the two have a module or memory in common."""
        return self is other or not self.things.isdisjoint(other.things) or _overlap(self.spans, other.spans)


def _overlap(a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]) -> bool:
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i][0] < b[j][1] and b[j][0] < a[i][1]:
            return True
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return False


def claim_of(model: nn.Module) -> Claim:
    """The claim of a model at present: a walk over its modules that reads no weight.

    >>> tied, other = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> whole = nn.Sequential(nn.Linear(2, 2), tied)
    >>> claim_of(whole).meets(claim_of(tied)), claim_of(whole).meets(claim_of(other))
    (True, False)
    >>> other.weight = tied.weight
    >>> claim_of(whole).meets(claim_of(other))
    True
    """
    things, spans = {id(model)}, set()
    for module in model.modules():
        for _, _, tensor in own_tensors(module):
            things.add(id(module))
            span = _span(tensor)
            if span is None:
                things.add(id(tensor))
            elif span[0] < span[1]:
                spans.add(span)
    return Claim(frozenset(things), tuple(sorted(spans)))


def address(tensor: Tensor) -> int:
    """The address of the tensor's data; 0 for a tensor without data of its own (meta, sparse, sharded)."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _span(tensor: Tensor) -> tuple[int, int] | None:
    start = address(tensor)
    if start == 0 or tensor.layout is not torch.strided:
        return None if tensor.numel() else (0, 0)
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return (start, start + reach * tensor.element_size()) if tensor.numel() else (0, 0)


@dataclass(eq=False)
class Hold:
    """One thread's turn at one model, waiting or inside: to read beside other threads, or to write alone."""

    claim: Claim
    what: str  # for messages: 'using("a")'
    thread: int = field(default_factory=threading.get_ident)
    shared: bool = False  # whether reading is enough: may change while the thread waits, is fixed once it is inside
    nested: bool = False  # this thread was inside already


_LOCK = threading.RLock()  # entered again where the garbage collector ends an abandoned `with` block under it
_CHANGED = threading.Condition(_LOCK)
_INSIDE: list[Hold] = []
_WAITING: list[Hold] = []  # in the order of asking


def deadline(timeout: float | None) -> float | None:
    """The time at which waiting ends; None for never. Raises ConfigError for anything but a number of seconds."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise ConfigError(f"timeout must be a number of seconds, at least 0, or None for no end; got {timeout!r}.")
    return time.monotonic() + timeout


def enter(hold: Hold, reads: Callable[[], bool] = bool, until: float | None = None) -> None:
    """Wait for the hold's turn. The hold is shared if `reads()` is true at that time; otherwise it is exclusive.

    Among models that meet, turns come in the order of asking, so no thread starves. A thread that is inside already
    passes those that wait for it. `leave` must follow, also when this raises.

    Raises DeltaStateError where the wait could not end: the thread would wait for its own shared hold, or two threads
    for each other; DeltaTimeoutError at the deadline.
    """
    with _LOCK:
        own = [other for other in tuple(_INSIDE) if other.thread == hold.thread and other.claim.meets(hold.claim)]
        hold.nested = bool(own)
        _WAITING.append(hold)
        try:
            while True:
                hold.shared = reads()
                if not hold.shared and any(other.shared for other in own):
                    raise DeltaStateError(
                        f"{hold.what} would wait for ever: this thread is inside {own[-1].what} on the same weights, "
                        f"which stay as they are until that block ends; call it after the block"
                    )
                blockers = _blockers(hold)
                if not blockers:
                    break
                _refuse_circle(hold)
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    names = ", ".join(sorted({other.what for other in blockers}))
                    raise DeltaTimeoutError(
                        f"{hold.what} waited until its timeout for other threads ({names}). Nothing was changed"
                    )
                _CHANGED.wait(left)
            _INSIDE.append(hold)
        finally:
            if hold in _WAITING:
                _WAITING.remove(hold)
            _CHANGED.notify_all()


def leave(hold: Hold) -> None:
    """End the hold, waiting or inside; a second call does nothing. An interrupt is raised after the hold has ended."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            with _LOCK:
                for holds in (_INSIDE, _WAITING):
                    if hold in holds:
                        holds.remove(hold)
                _CHANGED.notify_all()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def lower(hold: Hold) -> None:
    """Turn an exclusive hold into a shared one: other threads may read from now on."""
    with _LOCK:
        hold.shared = True
        _CHANGED.notify_all()


def alone(claim: Claim, what: str, timeout: float | None = None) -> AbstractContextManager[Hold]:
    """Keep every other thread's hold away for the length of a block. Raises as `enter` does."""
    return _held(Hold(claim, what), bool, timeout)


def beside(claim: Claim, what: str) -> AbstractContextManager[Hold]:
    """Keep writers away for the length of a block. Raises as `enter` does."""
    return _held(Hold(claim, what), lambda: True, None)


@contextmanager
def _held(hold: Hold, reads: Callable[[], bool], timeout: float | None) -> Iterator[Hold]:
    hold.thread = threading.get_ident()  # a block may begin in another thread than it was made in
    try:
        enter(hold, reads, deadline(timeout))
        yield hold
    finally:
        leave(hold)


def _blockers(hold: Hold) -> list[Hold]:
    """The holds that a waiting hold waits for; none if its turn has come."""
    inside, own = [], []
    for other in tuple(_INSIDE):
        if other.thread == hold.thread:
            own.append(other)
        elif other.claim.meets(hold.claim):
            inside.append(other)
    if hold.shared and all(other.shared for other in inside):
        inside = []
    before = takewhile(lambda other: other is not hold, tuple(_WAITING))
    for other in before:
        if other.claim.meets(hold.claim) and not any(mine.claim.meets(other.claim) for mine in own):
            inside.append(other)
    return inside


def _refuse_circle(hold: Hold) -> None:
    """Raise DeltaStateError if a thread that the hold waits for waits, perhaps through others, for this thread."""
    asked = {other.thread: other for other in _WAITING}
    todo, seen = [hold], set[int]()
    while todo:
        for other in _blockers(todo.pop()):
            if other.thread == hold.thread:
                raise DeltaStateError(
                    f"{hold.what} would wait for ever: it waits for another thread, which waits for {other.what} of "
                    f"this one; threads that use several models at once must take them in the same order"
                )
            if other.thread not in seen:
                seen.add(other.thread)
                todo += [asked[other.thread]] if other.thread in asked else []


def _forked() -> None:
    """In a forked process only the thread that forked goes on, so the holds of other threads are dropped."""
    global _LOCK, _CHANGED
    _LOCK = threading.RLock()
    _CHANGED = threading.Condition(_LOCK)
    _INSIDE[:] = [hold for hold in _INSIDE if hold.thread == threading.get_ident()]
    _WAITING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
