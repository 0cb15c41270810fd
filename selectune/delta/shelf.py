"""Several named deltas on one model, one of them (or none) in place."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary, ref

from torch import nn

from selectune.delta import apply as live
from selectune.delta.apply import Layer, Write
from selectune.delta.delta import Delta
from selectune.errors import ConfigError, DeltaStateError

_SHELVES: WeakKeyDictionary[nn.Module, Shelf] = WeakKeyDictionary()


class Shelf:
    """Named deltas of one base model, switched in place: `st.switch(model, "a")`, `st.switch(model, None)`.

    A switch reads and writes the scalars of the delta that leaves and of the one that comes, nothing else: O(B). It is
    all or nothing, and the base comes back bit for bit. Within these scalars it notices what changed meanwhile and
    refuses; a weight that no delta writes is not looked at. The shelf is found through the model, which keeps it
    alive. Not for several threads.

    Raises BaseMismatchError for a delta of another base, DeltaStateError if a tuner is attached, another delta is
    applied, or the model has another shelf in use, ConfigError for names that are no strings.

    >>> import torch
    >>> from selectune.delta import diff
    >>> base, tuned = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))
    >>> shelf = Shelf(base, {"tuned": diff(base, tuned)})
    >>> switch(base, "tuned")
    >>> torch.equal(base.weight, tuned.weight), shelf.active
    (True, 'tuned')
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        if not isinstance(deltas, Mapping):
            raise ConfigError(
                f"a shelf takes {{name: delta}}, as load(path) returns them; got {type(deltas).__name__}."
            )
        for name, delta in deltas.items():
            if not isinstance(name, str) or not name or not isinstance(delta, Delta):
                raise ConfigError(
                    f"a shelf takes {{name: delta}}, as load(path) returns them; got {name!r}: {type(delta).__name__}."
                )
        found, stack = live.ready(model), live.stack_of(model)
        live.forget_undone(stack, found)
        if stack:
            raise DeltaStateError(
                f"{stack[-1].label} is applied to this model; revert it (or switch to None) before deltas are shelved"
            )
        for delta in deltas.values():
            live.check_structure(delta, found)
            live.check_base(delta, found)
        self._deltas = dict(deltas)
        self._active: str | None = None
        self._model = ref(live.unwrapped(model))
        _SHELVES[live.unwrapped(model)] = self

    @property
    def names(self) -> tuple[str, ...]:
        """The names that can be switched to, besides None."""
        return tuple(self._deltas)

    @property
    def active(self) -> str | None:
        """The name of the delta in place; None for the base."""
        model = self._model()
        stack = [] if model is None else live.stack_of(model)
        return self._active if self._active is not None and self._holds(stack) else None

    def switch(self, name: str | None) -> None:
        """Put a delta in place of the present one; None: of the base. Raises as `switch` does."""
        model = self._model()
        if model is None:
            raise DeltaStateError("the model of this shelf is gone; make a shelf for the one in use")
        if name is not None and name not in self._deltas:
            raise ConfigError(
                f"no delta is called {name!r} here; known: {', '.join(self._deltas) or 'none'} (or None)."
            )
        found, stack = live.ready(model), live.stack_of(model)
        live.forget_undone(stack, found)
        if stack and not self._holds(stack):
            raise DeltaStateError(
                f"{stack[-1].label} was applied to the model besides its shelf; revert it before switching"
            )
        leaving: list[Write] = []
        if stack and self._active is not None:
            leaving = live.undo(self._deltas[self._active], found, stack[0].olds)
        coming: list[Write] = []
        layer: Layer | None = None
        if name is not None:
            delta = self._deltas[name]
            live.check_structure(delta, found)
            live.check_base(delta, found, under=stack)
            coming = live.writes(delta, found, under=stack)
            layer = live.layer_of(delta, coming)
        live.write_all([*leaving, *coming])
        stack[:] = [] if layer is None else [layer]
        self._active = name

    def _holds(self, stack: list[Layer]) -> bool:
        active = None if self._active is None else self._deltas[self._active]
        return active is not None and [layer.digest for layer in stack] == [active.digest]

    def __repr__(self) -> str:
        return f"<Shelf of {', '.join(self._deltas) or 'nothing'}; active: {self.active}>"


def switch(model: nn.Module, name: str | None) -> None:
    """Put the named delta of the model's shelf in place of the present one; None brings the base back. O(B).

    Raises ConfigError for an unknown name (listing the known ones), DeltaStateError if the model has no shelf, a tuner
    is attached, a delta was applied besides the shelf, or the present delta's values moved; BaseMismatchError if the
    base changed where the coming delta writes. Then nothing was changed. Changes elsewhere are not seen: that would
    take a read of all weights (`delta.verify(model, full=True)`).
    """
    shelf = _SHELVES.get(live.unwrapped(model))
    if shelf is None:
        raise DeltaStateError('the model has no deltas to switch between; make them known: Shelf(model, {"a": delta})')
    shelf.switch(name)
