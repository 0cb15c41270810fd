"""A run's module: `--on lora:r=8` under a selective method, or a dense peer, which trains all of its module."""

from __future__ import annotations

import dataclasses

from selectune import adapters
from selectune.adapters import KINDS, Adapted, Kind, Spec, parse, put_on, rebuild
from selectune.delta import Delta
from selectune.errors import ConfigError
from selectune.method import Method
from selectune.models.bases import LoadedModel
from selectune.scope import Scope


def peer(method: str) -> Spec | None:
    """The spec of a dense peer such as `lora:r=16`; None for anything else."""
    return parse(method) if method.partition(":")[0] in KINDS else None


def spec_of(method: str, on: str | None) -> Spec | None:
    """What a run puts on its model; raises ConfigError where the two do not go together."""
    dense = peer(method)
    if on is None:
        return dense
    if dense is not None:
        raise ConfigError(
            f"The method {method} is a module of its own, so nothing goes under it: leave out --on {on}, or give a "
            "selective method, which then selects from it."
        )
    spec = parse(on)
    if not KINDS[spec.kind].on:
        allowed = ", ".join(kind.name for kind in KINDS.values() if kind.on)
        raise ConfigError(f"--on {on}: {spec.kind} is a way to train a module, not a module. --on takes {allowed}.")
    return spec


def method_of(spec: Spec) -> Method:
    """A dense peer as a method: every tensor that is not frozen is trained whole, the module's and a fresh head's."""
    return Method(Scope(include=(), train_fully=("*",)), name=spec.kind)


def with_module(loaded: LoadedModel, spec: Spec, seed: int, steps: int | None) -> LoadedModel:
    """The loaded model with a module on it; all else is frozen but the tensors that no checkpoint held.

    `steps`: of the run, for ranks that move in it; None under a selection, whose entries nothing else may write.
    """
    return _with(loaded, put_on(loaded.model, spec, seed, keep=loaded.initialised, steps=steps))


def with_module_of(loaded: LoadedModel, delta: Delta) -> LoadedModel:
    """The loaded model with the module that a delta was trained on, if there was one."""
    if "module" not in delta.info:
        return loaded
    return _with(loaded, rebuild(loaded.model, delta, keep=loaded.initialised))


def size_of(loaded: LoadedModel, spec: Spec, seed: int) -> int:
    """How many scalars a module has on this model; it is put on and taken off again."""
    adapted = put_on(loaded.model, spec, seed, record=False)
    try:
        return sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    finally:
        adapted.remove()


def virtual_tokens(spec: Spec | None) -> int:
    """Positions that a module takes from the examples."""
    return int(spec.options.get("tokens", 0)) if spec is not None else 0


def mergeable(delta: Delta) -> None:
    """Raises ConfigError for a delta whose module is no change of the base's weights."""
    spec = adapters.spec_of(delta)
    if spec is not None and not KINDS[spec.kind].merges:
        raise ConfigError(
            f"The delta was trained on {spec.kind}, which computes something of its own: it cannot be folded into "
            f"weights. `selectune eval` uses it as it is. Can be merged: {', '.join(k.name for k in _merging())}."
        )


def _merging() -> list[Kind]:
    return [kind for kind in KINDS.values() if kind.merges]


def _with(loaded: LoadedModel, adapted: Adapted) -> LoadedModel:
    """peft's model around ours puts a prefix before names, so fresh tensors are named anew."""
    tensors = {**dict(adapted.base.named_parameters()), **dict(adapted.base.named_buffers())}
    fresh = {id(tensors[name]) for name in loaded.initialised}
    after = (*adapted.model.named_parameters(), *adapted.model.named_buffers())
    names = tuple(sorted(name for name, tensor in after if id(tensor) in fresh))
    return dataclasses.replace(loaded, model=adapted.model, initialised=names, adapted=adapted)
