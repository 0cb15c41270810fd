"""Several named deltas on one model, of which one (or none) is in place; threads that read the model take turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from weakref import WeakKeyDictionary, ref

from torch import nn

from selectune.delta.file.content import Content
from selectune.delta.file.fingerprint import unwrapped
from selectune.delta.live import door
from selectune.delta.live.apply import layer_of, moved, undo, writes
from selectune.delta.live.base_check import check_base, check_structure
from selectune.delta.live.door import Claim, Hold
from selectune.delta.live.layers import Layer, check_sharing, exclusive, forget_undone, ready, sharing, stack_of
from selectune.delta.live.quick import SwitchPlan, look, plan_for, worth_it
from selectune.delta.live.writing import Write, write_all
from selectune.errors import ConfigError, DeltaStateError

_SHELVES: WeakKeyDictionary[nn.Module, Shelf] = WeakKeyDictionary()
_SHELVES_LOCK = RLock()


class Shelf:
    """Named deltas of one base model, switched in place: `st.switch(model, "a")`, `st.switch(model, None)`.

    A switch reads and writes only the scalars of the old delta and of the new one: O(B). It is all or nothing, and the
    base comes back bit for bit. If one of these scalars was changed by other means, the switch refuses; it does not
    look at weights that no delta writes. The model keeps its shelf alive, and `switch` finds it there. The first switch
    to a name prepares that delta for this model, which takes longer and needs about 28 bytes a scalar.

    Threads may share a shelf. Those that change the model take turns, so switches never mix and the base is never lost.
    But another thread may switch while a thread computes: only a `using` block keeps the delta in place until the
    answer is there. Tasks of one asyncio loop are one thread here and do not exclude each other.

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

    def __init__(self, model: nn.Module, deltas: Mapping[str, Content]) -> None:
        if not isinstance(deltas, Mapping):
            raise ConfigError(
                f"a shelf takes {{name: delta}}, as load(path) returns them; got {type(deltas).__name__}."
            )
        for name, delta in deltas.items():
            _check_pair(name, delta)
        with exclusive(model, "making a shelf") as hold:
            found, stack = ready(model), stack_of(model)
            forget_undone(stack, found)
            if stack:
                raise DeltaStateError(
                    f"{stack[-1].label} is applied to this model; revert it (or switch to None) before deltas are "
                    f"shelved"
                )
            check_sharing(model, hold.claim)
            if deltas:
                _check_other_shelves(model, hold.claim)
            self._stack = stack
            self._deltas: dict[str, Content] = {}
            self._plans: dict[str, SwitchPlan] = {}
            self._changing = RLock()
            own, plans = unwrapped(model), self._plans
            self._sight = (look(own), hold.claim)
            for delta in deltas.values():
                check_structure(delta, found)
                check_base(delta, found)
            self._deltas = dict(deltas)
            # plans hold the model's tensors: they go with it
            self._model = ref(own, lambda _: plans.clear())
            with _SHELVES_LOCK:
                _SHELVES[own] = self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the deltas. None, the base, is not among them."""
        return tuple(self._deltas)

    @property
    def active(self) -> str | None:
        """The name of the delta in place; None for the base. Other threads may change it at any time."""
        layers = tuple(self._stack)
        return layers[0].name if self._holds(layers) and self._model() is not None else None

    @contextmanager
    def using(self, name: str | None, timeout: float | None = None) -> Iterator[nn.Module]:
        """The model with one delta in place (None: the base) for the length of a `with` block.

        Threads that use the same name may be inside together. A thread that asks for another name, or switches, waits
        until they have left, and later threads queue behind it: turns come in the order of asking. A thread may nest
        blocks of one name. After the block the delta stays in place until somebody asks for another name. A thread that
        was started inside the block needs no block of its own, and must not wait for one.

        Entering costs a walk over the modules, a read of the delta's scalars, and a switch if another delta is in
        place. `timeout` limits the wait for other threads, in seconds.

        Raises as `switch` does; DeltaStateError if the block is inside one of another name in this thread;
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

    def add(self, name: str, delta: Content) -> None:
        """Add one more delta, checked as the shelf's first ones were; other threads may use the shelf at the same time.

        Raises ConfigError for a name that is taken or no string, BaseMismatchError for a delta of another base,
        DeltaStateError as the making of a shelf does.
        """
        _check_pair(name, delta)
        model = self._alive()
        with door.beside(self._claim(model), f"adding {name!r}") as hold:
            found, stack = ready(model), list(self._stack)
            if stack and not self._holds(stack):
                raise DeltaStateError(
                    f"{stack[-1].label} was applied to the model besides its shelf; revert it before deltas are added"
                )
            _check_other_shelves(model, hold.claim)
            check_structure(delta, found)
            check_base(delta, found, under=stack)
            with self._changing:
                if name in self._deltas:
                    raise ConfigError(
                        f"a delta is called {name!r} here already; remove it first, or name this one otherwise."
                    )
                self._deltas = {**self._deltas, name: delta}

    def remove(self, name: str) -> None:
        """Forget a delta. If it is in place, wait for the threads that use it and bring the base back first.

        Raises ConfigError for an unknown name, DeltaStateError inside a block of this thread that uses the delta, and
        as `switch` does if the base cannot come back; the shelf keeps the delta then.
        """
        model = self._alive()
        self._check_name(name)
        hold = Hold(self._claim(model), f"removing {name!r}")
        try:
            # no writer is inside beside a reader, so a delta that is not in place can go at once
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
            door.leave(hold)  # the weights do not hold the delta's values: a switch mends or explains that
            door.enter(hold, until=until)
        self._switch(model, name, hold.claim)
        door.lower(hold)

    def _in_place(self, name: str | None) -> bool:
        """Whether the delta is in place according to the record, which changes in an exclusive hold only."""
        layers = tuple(self._stack)
        return not layers if name is None else self._holds(layers) and layers[0].name == name

    def _values_in_place(self, model: nn.Module, name: str | None, claim: Claim) -> bool:
        """Whether the delta is in place according to the weights that it writes."""
        if sharing(model, claim) is not None:
            return False
        if name is None:
            return True
        plan = self._plans.get(name)
        if plan is not None and plan.seen == look(model):
            return plan.in_place()
        return not moved(self._deltas[name], ready(model))

    def _switch(self, model: nn.Module, name: str | None, claim: Claim) -> None:
        self._check_name(name)
        check_sharing(model, claim)
        if not self._switch_as_planned(model, name):
            self._switch_with_care(model, name, claim)

    def _switch_as_planned(self, model: nn.Module, name: str | None) -> bool:
        """Switch by the plans; False, with nothing done, unless they are certain to be right."""
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
        """Switch after a check of everything, with an exact message for each fault; keep the result as a plan."""
        found, stack = ready(model), self._stack
        forget_undone(stack, found)
        if stack and not self._holds(stack):
            raise DeltaStateError(
                f"{stack[-1].label} was applied to the model besides its shelf; revert it before switching"
            )
        leaving: list[Write] = []
        if stack:
            leaving = undo(self._deltas[stack[0].name], found, stack[0].olds)
        coming: list[Write] = []
        layer: Layer | None = None
        if name is not None:
            delta = self._deltas[name]
            check_structure(delta, found)
            check_base(delta, found, under=stack)
            coming = writes(delta, found, under=stack)
            layer = layer_of(delta, coming, claim, name)
            self._plans.pop(name, None)
            if worth_it(coming, found):
                self._plans[name] = plan_for(delta, look(model), found, coming, layer)
        write_all([*leaving, *coming], stack, [] if layer is None else [layer])

    def _holds(self, stack: list[Layer] | tuple[Layer, ...]) -> bool:
        own = self._deltas.get(stack[0].name) if len(stack) == 1 else None
        return own is not None and own.digest == stack[0].digest

    # --- checks ---------------------------------------------------------------------------------------------

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
        """The model's present claim; raises DeltaStateError if a tuner is attached or tensors have no data."""
        seen, (before, claim) = look(model), self._sight
        if seen != before:
            ready(model)
            claim = door.claim_of(model)
            self._sight = (seen, claim)
        return claim

    def __repr__(self) -> str:
        return f"<Shelf of {', '.join(self._deltas) or 'nothing'}; active: {self.active}>"


def switch(model: nn.Module, name: str | None, timeout: float | None = None) -> None:
    """Put the named delta of the model's shelf in place of the present one; None brings the base back. O(B).

    Threads that switch take turns, and a switch waits for threads inside a `using` block, at most for `timeout`
    seconds. But as soon as it has returned another thread may switch again, also while a forward pass of this thread is
    running, which then mixes two deltas. A thread that needs the answer of one delta uses a block:
    `with shelf.using(name): answer = model(x)`.

    Raises ConfigError for an unknown name (listing the known ones), DeltaStateError if the model has no shelf, a tuner
    is attached, a delta was applied without the shelf, the present delta's values moved, or this thread is inside a
    `using` block; DeltaTimeoutError; BaseMismatchError if the base changed where the new delta writes. Then nothing was
    changed. It does not see changes elsewhere, which would take a read of all weights
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
    if not isinstance(name, str) or not name or not isinstance(delta, Content):
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
