"""The adapter of a run: `--on lora:r=8` under a selective method, or `--method lora:r=8`, which trains all of it."""

from __future__ import annotations

import dataclasses

from selectune import adapters
from selectune.adapters import KINDS, Adapted, Spec, for_tokenizer, parse, put_on, rebuild
from selectune.delta import Delta
from selectune.errors import ConfigError
from selectune.method import Method
from selectune.models.bases import LoadedModel
from selectune.scope import Scope


def peer(method: str) -> Spec | None:
    """The adapter that a method such as `lora:r=16` trains in full; None for any other method."""
    return parse(method) if method.partition(":")[0] in KINDS else None


def parts(text: str) -> tuple[str, str]:
    """Splits `id3:every=10+lora:r=8` into the method and the adapter under it; other methods stay whole.

    >>> parts("id3:every=10+lora:r=8"), parts("lora:targets=query+value")
    (('id3:every=10', 'lora:r=8'), ('lora:targets=query+value', ''))
    >>> parts("pafi+lora:targets=query+value")
    ('pafi', 'lora:targets=query+value')
    """
    if text.partition(":")[0].strip() in KINDS:
        return text, ""
    method, _, on = text.partition("+")
    return method, on


def spec_of(method: str, on: str | None) -> Spec | None:
    """The adapter that a run puts on its model. Raises ConfigError if `method` and `on` do not go together."""
    dense = peer(method)
    if on is None:
        return dense
    if dense is not None:
        raise ConfigError(
            f"The method {method} is an adapter of its own, so nothing goes under it: leave out --on {on}, or give a "
            "selective method, which then selects from it."
        )
    spec = parse(on)
    if not KINDS[spec.kind].on:
        allowed = ", ".join(kind.name for kind in KINDS.values() if kind.on)
        raise ConfigError(f"--on {on}: {spec.kind} is a way to train an adapter, not an adapter. --on takes {allowed}.")
    return spec


def method_of(spec: Spec) -> Method:
    """An adapter that is trained in full, as a method: every tensor that is not frozen is a whole tensor."""
    return Method(Scope(include=(), train_fully=("*",)), name=spec.kind)


def with_adapter(
    loaded: LoadedModel, spec: Spec, seed: int, steps: int | None, texts: int = 1, freeze: bool = True
) -> LoadedModel:
    """The loaded model with an adapter on it. Everything else is frozen, except tensors that no checkpoint held.

    `freeze=False`: nothing is frozen, for a method that trains entries of the base beside the adapter.

    `steps`: those of the run, for ranks that move during it; None under a selection, because nothing else may then
    write the selected entries. `texts`: how many a row has, 1 or 2, for adapters of special tokens.
    """
    chosen, fresh = for_tokenizer(spec, loaded.tokenizer, texts), _fresh(loaded)
    adapted = put_on(loaded.model, chosen, seed, keep=loaded.initialised, steps=steps, freeze=freeze)
    return _with(loaded, adapted, fresh)


def with_adapter_of(loaded: LoadedModel, delta: Delta) -> LoadedModel:
    """The loaded model with the adapter that a delta was trained on, if there was one."""
    if "module" not in delta.info:
        return loaded
    fresh = _fresh(loaded)
    return _with(loaded, rebuild(loaded.model, delta, keep=loaded.initialised), fresh)


def size_of(loaded: LoadedModel, spec: Spec, seed: int, texts: int = 1) -> int:
    """The number of scalars that an adapter has on this model. The adapter is put on and taken off again."""
    adapted = put_on(loaded.model, for_tokenizer(spec, loaded.tokenizer, texts), seed, record=False)
    try:
        return sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    finally:
        adapted.remove()


def virtual_tokens(spec: Spec | None) -> int:
    """The number of positions that an adapter takes from the examples."""
    return int(spec.options.get("tokens", 0)) if spec is not None else 0


def mergeable(delta: Delta) -> None:
    """Raises ConfigError for a delta whose adapter is not a change of the base's weights."""
    spec = adapters.spec_of(delta)
    if spec is not None and not KINDS[spec.kind].merges:
        raise ConfigError(
            f"The delta was trained on {spec.kind}, which is no change of the base's weights: it cannot be folded "
            "into weights. `selectune eval` uses it as it is. These can be merged: "
            f"{', '.join(kind.name for kind in KINDS.values() if kind.merges)}."
        )


def _fresh(loaded: LoadedModel) -> set[int]:
    """The ids of the tensors that no checkpoint held; adapters rename some of them."""
    every = {"remove_duplicate": False}  # the name may be the second one of a tied tensor
    tensors = {**dict(loaded.model.named_parameters(**every)), **dict(loaded.model.named_buffers(**every))}
    return {id(tensors[name]) for name in loaded.initialised}


def _with(loaded: LoadedModel, adapted: Adapted, fresh: set[int]) -> LoadedModel:
    """Names the fresh tensors anew, because peft's layers and its model around ours change names."""
    after = (*adapted.model.named_parameters(), *adapted.model.named_buffers())
    names = tuple(sorted(name for name, tensor in after if id(tensor) in fresh))
    return dataclasses.replace(loaded, model=adapted.model, initialised=names, adapted=adapted)
