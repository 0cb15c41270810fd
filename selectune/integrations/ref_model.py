"""TRL's `sync_ref_model` under a tuner: only the weights of a policy are paired with those of its reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from selectune.scope import OWN


def pair_up(callbacks: Iterable[Any]) -> None:
    """Hides the tuner's parameters from every `SyncRefModelCallback` among a Trainer's callbacks.

    That callback pairs the parameters of two models in order, and a policy with a tuner has one more.
    """
    for callback in callbacks:
        known = any(kind.__name__ == "SyncRefModelCallback" for kind in type(callback).__mro__)
        if known and not isinstance(vars(callback).get("sync_target_model"), _Pairs):
            callback.sync_target_model = _Pairs(callback.sync_target_model)


class _Pairs:
    """TRL's own function, called with both models as they are without a tuner."""

    def __init__(self, sync: Any) -> None:
        self._sync = sync

    def __call__(self, model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        self._sync(_Bare(model), _Bare(target_model), alpha)


class _Bare:
    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self._model.named_parameters():
            if not name.rpartition(".")[2].startswith(OWN):
                yield parameter
