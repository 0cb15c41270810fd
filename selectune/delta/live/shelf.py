"""Several named deltas on one model, one of them (or none) in place; threads that read it take turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from weakref import WeakKeyDictionary, ref

from torch import nn

from selectune.delta.delta import Delta
from selectune.delta.file.fingerprint import unwrapped
from selectune.delta.live import apply as live
from selectune.delta.live import door
from selectune.delta.live.apply import Layer, Write
from selectune.delta.live.door import Claim, Hold
from selectune.delta.live.quick import SwitchPlan, look, plan_for, worth_it
from selectune.delta.live.writing import write_all
from selectune.errors import ConfigError, DeltaStateError

_SHELVES: WeakKeyDictionary[nn.Module, Shelf] = WeakKeyDictionary()
_SHELVES_LOCK = RLock()


class Shelf:
    """Named deltas of one base model, switched in place: `st.switch(model, "a")`, `st.switch(model, None)`.

    A switch reads and writes the scalars of the delta that leaves and of the one that comes, nothing else: O(B). It is
    all or nothing, and the base comes back bit for bit. Within these scalars it notices what changed meanwhile and
    refuses; a weight that no delta writes is not looked at. The shelf is found through the model, which keeps it
    alive. The first switch to a name makes it ready for this model, which takes longer and about 28 bytes a scalar.

    Threads may share a shelf. Whatever changes the model takes turns, so switches never mix and the base is never lost.
    What a thread computes between two switches is another matter: only a `using` block keeps the delta in place until
    the answer is there. Tasks of one asyncio loop are one thread here and do not exclude each other.

    Raises BaseMismatchError for a delta of another base, DeltaStateError if a tuner is attached, another delta is
    applied, the model has another shelf in use or shares weights with a model that has a shelf, ConfigError for names
    that are no strings.

    >>> import torch
    >>> from selectune.delta import diff
    >>> base, tuned = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))
    >>> shelf = Shelf(base, {"tuned": diff(base, tuned)})
    >>> with shelf.using("tuned") as model:
    ...     torch.equal(model.weight, tuned.weight), shelf.active
    (True, 'tuned')
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        if not isinstance(deltas, Mapping):
            raise ConfigError(
                f"a shelf takes {{name: delta}}, as load(path) returns them; got {type(deltas).__name__}."
            )
        for name, delta in deltas.items():
            _check_pair(name, delta)
        with live.exclusive(model, "making a shelf") as hold:
            found, stack = live.ready(model), live.stack_of(model)
            live.forget_undone(stack, found)
            if stack:
                raise DeltaStateError(
                    f"{stack[-1].label} is applied to this model; revert it (or switch to None) before deltas are "
                    f"shelved"
                )
            live.check_besides(model, hold.claim)
            if deltas:
                _check_other_shelves(model, hold.claim)
            self._stack = stack
            self._deltas: dict[str, Delta] = {}
            self._plans: dict[str, SwitchPlan] = {}
            self._changing = RLock()
            own, plans = unwrapped(model), self._plans
            self._sight = (look(own), hold.claim)
            for delta in deltas.values():
                live.check_structure(delta, found)
                live.check_base(delta, found)
            self._deltas = dict(deltas)
            # plans hold the model's tensors: they go with it
            self._model = ref(own, lambda _: plans.clear())
            with _SHELVES_LOCK:
                _SHELVES[own] = self

    @property
    def names(self) -> tuple[str, ...]:
        """The names that can be switched to, besides None."""
        return tuple(self._deltas)

    @property
    def active(self) -> str | None:
        """The name of the delta in place; None for the base. Other threads may change it at any time."""
        layers = tuple(self._stack)
        return layers[0].name if self._holds(layers) and self._model() is not None else None

    @contextmanager
    def using(self, name: str | None, timeout: float | None = None) -> Iterator[nn.Module]:
        """The model with one delta in place (None: the base) for the length of a `with` block, whatever others do.

        Threads that use the same name are inside together. A thread that asks for another name, or switches, waits
        until they are gone, and who comes later queues behind it: turns come in the order of asking. Blocks of one
        name may be nested in a thread. After the block the delta stays in place until another name is asked for. A
        thread that was started inside the block needs no block of its own, and must not wait for one.

        Entering costs a walk over the modules and a read of the delta's scalars, and a switch where another delta is in
        place. Seconds of `timeout` limit the wait for other threads.

        Raises as `switch` does; DeltaStateError where the block stands inside one of another name in this thread;
        DeltaTimeoutError.

        >>> import torch
        >>> from selectune.delta import diff
        >>> base, tuned = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))
        >>> shelf = Shelf(base, {"tuned": diff(base, tuned)})
        >>> with shelf.using("tuned"), shelf.using(None):
        ...     pass
        Traceback (most recent call last):
        selectune.errors.DeltaStateError: using(None) would wait for ever: this thread is inside using('tuned') on ...
        """
        model, until = self._alive(), door.deadline(timeout)
        self._check_name(name)
        hold = Hold(self._claim(model), f"using({name!r})")
        try:
            self._enter(model, name, hold, until)
            yield model
        finally:
            door.leave(hold)

    def switch(self, name: str | None, timeout: float | None = None) -> None:
        """Put a delta in place of the present one; None: of the base. Raises as `switch` does."""
        model = self._alive()
        self._check_name(name)
        with door.alone(self._claim(model), f"a switch to {name!r}", timeout) as hold:
            self._switch(model, name, hold.claim)

    def add(self, name: str, delta: Delta) -> None:
        """Make one more delta known, checked as the shelf's first ones were; threads may be using others meanwhile.

        Raises ConfigError for a name that is taken or no string, BaseMismatchError for a delta of another base,
        DeltaStateError as the making of a shelf does.
        """
        _check_pair(name, delta)
        model = self._alive()
        with door.beside(self._claim(model), f"adding {name!r}") as hold:
            found, stack = live.ready(model), list(self._stack)
            if stack and not self._holds(stack):
                raise DeltaStateError(
                    f"{stack[-1].label} was applied to the model besides its shelf; revert it before deltas are added"
                )
            _check_other_shelves(model, hold.claim)
            live.check_structure(delta, found)
            live.check_base(delta, found, under=stack)
            with self._changing:
                if name in self._deltas:
                    raise ConfigError(
                        f"a delta is called {name!r} here already; remove it first, or name this one otherwise."
                    )
                self._deltas = {**self._deltas, name: delta}

    def remove(self, name: str) -> None:
        """Forget a delta. If it is in place, threads that use it are waited for and the base comes back first.

        Raises ConfigError for an unknown name, DeltaStateError inside a block of this thread that uses the delta, and
        as `switch` does where the base cannot come back; the delta is kept then.
        """
        model = self._alive()
        self._check_name(name)
        hold = Hold(self._claim(model), f"removing {name!r}")
        try:
            # while others only read, what is in place stays: a delta that is not may go at once
            door.enter(hold, lambda: all(layer.name != name for layer in tuple(self._stack)))
            with self._changing:
                self._check_name(name)
                if not hold.shared:
                    self._switch(model, None, hold.claim)
                self._deltas = {own: delta for own, delta in self._deltas.items() if own != name}
                self._plans.pop(name, None)
        finally:
            door.leave(hold)

    # --- inside a turn --------------------------------------------------------------------------------------

    def _enter(self, model: nn.Module, name: str | None, hold: Hold, until: float | None) -> None:
        """Take the hold with the delta in place, switching if need be; raises as `using` does."""
        door.enter(hold, lambda: self._in_place(name), until)
        if hold.shared:
            self._check_name(name)
            if self._values_in_place(model, name, hold.claim):
                return
            if hold.nested:
                raise DeltaStateError(
                    f"{hold.what} inside another block of this thread: the weights changed in that block, by other "
                    f"means than this shelf, and cannot be mended before it ends"
                )
            door.leave(hold)  # the weights are not what they should be: a switch mends or explains that
            door.enter(hold, until=until)
        self._switch(model, name, hold.claim)
        door.lower(hold)

    def _in_place(self, name: str | None) -> bool:
        """Whether the record says so. It changes in an exclusive hold only."""
        layers = tuple(self._stack)
        return not layers if name is None else self._holds(layers) and layers[0].name == name

    def _values_in_place(self, model: nn.Module, name: str | None, claim: Claim) -> bool:
        """Whether the weights say so too, as far as the delta's scalars can tell."""
        if live.besides(model, claim) is not None:
            return False
        if name is None:
            return True
        plan = self._plans.get(name)
        if plan is not None and plan.seen == look(model):
            return plan.in_place()
        return not live.moved(self._deltas[name], live.ready(model))

    def _switch(self, model: nn.Module, name: str | None, claim: Claim) -> None:
        self._check_name(name)
        live.check_besides(model, claim)
        if not self._switch_as_planned(model, name):
            self._switch_with_care(model, name, claim)

    def _switch_as_planned(self, model: nn.Module, name: str | None) -> bool:
        """Switch if nothing unforeseen happened; False if something may have, and nothing was done."""
        layers = tuple(self._stack)
        leaving = self._plans.get(layers[0].name) if self._holds(layers) else None
        coming = None if name is None else self._plans.get(name)
        if (layers and (leaving is None or leaving.layer is not layers[0])) or (name is not None and coming is None):
            return False
        seen = look(model)
        if any(plan is not None and plan.seen != seen for plan in (leaving, coming)):
            return False
        if (leaving is not None and not leaving.in_place()) or (coming is not None and not coming.fits(leaving)):
            return False
        made = [*(leaving.off if leaving else ()), *(coming.on if coming else ())]
        write_all(made, self._stack, [coming.layer] if coming else [])
        return True

    def _switch_with_care(self, model: nn.Module, name: str | None, claim: Claim) -> None:
        """Switch and say exactly what is wrong if something is; what was learned is kept as a plan."""
        found, stack = live.ready(model), self._stack
        live.forget_undone(stack, found)
        if stack and not self._holds(stack):
            raise DeltaStateError(
                f"{stack[-1].label} was applied to the model besides its shelf; revert it before switching"
            )
        leaving: list[Write] = []
        if stack:
            leaving = live.undo(self._deltas[stack[0].name], found, stack[0].olds)
        coming: list[Write] = []
        layer: Layer | None = None
        if name is not None:
            delta = self._deltas[name]
            live.check_structure(delta, found)
            live.check_base(delta, found, under=stack)
            coming = live.writes(delta, found, under=stack)
            layer = live.layer_of(delta, coming, claim, name)
            self._plans.pop(name, None)
            if worth_it(coming, found):
                self._plans[name] = plan_for(delta, look(model), found, coming, layer)
        write_all([*leaving, *coming], stack, [] if layer is None else [layer])

    def _holds(self, stack: list[Layer] | tuple[Layer, ...]) -> bool:
        own = self._deltas.get(stack[0].name) if len(stack) == 1 else None
        return own is not None and own.digest == stack[0].digest

    # --- what is asked for ----------------------------------------------------------------------------------

    def _alive(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise DeltaStateError("the model of this shelf is gone; make a shelf for the one in use")
        return model

    def _check_name(self, name: str | None) -> None:
        if name is not None and name not in self._deltas:
            raise ConfigError(
                f"no delta is called {name!r} here; known: {', '.join(self._deltas) or 'none'} (or None)."
            )

    def _claim(self, model: nn.Module) -> Claim:
        """The model's claim as it stands; raises DeltaStateError if a tuner is attached or tensors have no data."""
        seen, (before, claim) = look(model), self._sight
        if seen != before:
            live.ready(model)
            claim = door.claim_of(model)
            self._sight = (seen, claim)
        return claim

    def __repr__(self) -> str:
        return f"<Shelf of {', '.join(self._deltas) or 'nothing'}; active: {self.active}>"


def switch(model: nn.Module, name: str | None, timeout: float | None = None) -> None:
    """Put the named delta of the model's shelf in place of the present one; None brings the base back. O(B).

    Threads may call it at once: they take turns, and a switch waits for those that are inside a `using` block, at most
    for `timeout` seconds. But as soon as it has returned another thread may switch again, also while a forward pass of
    this one is running, whose answer is then torn between two deltas. A thread that needs the answer of one delta
    reads through the door: `with shelf.using(name): answer = model(x)`.

    Raises ConfigError for an unknown name (listing the known ones), DeltaStateError if the model has no shelf, a tuner
    is attached, a delta was applied besides the shelf, the present delta's values moved, or this thread is inside a
    `using` block; DeltaTimeoutError; BaseMismatchError if the base changed where the coming delta writes. Then nothing
    was changed. Changes elsewhere are not seen: that would take a read of all weights
    (`delta.verify(model, full=True)`).

    >>> import torch
    >>> from selectune.delta import diff
    >>> base, tuned = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))
    >>> shelf = Shelf(base, {"tuned": diff(base, tuned)})
    >>> switch(base, "tuned")
    >>> torch.equal(base.weight, tuned.weight), shelf.active
    (True, 'tuned')
    """
    with _SHELVES_LOCK:
        shelf = _SHELVES.get(unwrapped(model))
    if shelf is None:
        raise DeltaStateError('the model has no deltas to switch between; make them known: Shelf(model, {"a": delta})')
    shelf.switch(name, timeout)


def _check_pair(name: object, delta: object) -> None:
    if not isinstance(name, str) or not name or not isinstance(delta, Delta):
        raise ConfigError(
            f"a shelf takes {{name: delta}}, as load(path) returns them; got {name!r}: {type(delta).__name__}."
        )


def _check_other_shelves(model: nn.Module, claim: Claim) -> None:
    """Raise DeltaStateError if another model with the same weights has deltas on its shelf: they would mix."""
    model = unwrapped(model)
    with _SHELVES_LOCK:
        others = [(other, shelf) for other, shelf in _SHELVES.items() if other is not model and shelf.names]
    for other, shelf in others:
        if door.claim_of(other).meets(claim):
            raise DeltaStateError(
                f"the model shares weights with another {type(other).__name__} (a part of it, a whole that it belongs "
                f"to, or one with tied weights) that has a shelf of {', '.join(shelf.names)}; put all deltas on one "
                f"shelf, or remove those first"
            )
