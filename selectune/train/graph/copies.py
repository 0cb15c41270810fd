"""What a tuner puts on a model, where, and how a copy of such a model becomes an ordinary one again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from selectune.errors import AlreadyAttachedError, TunerError
from selectune.scope import VALUES, is_own
from selectune.train.graph.own_hooks import Own, ours
from selectune.train.graph.weights import Weight, let_go

_TRAINABLE = "_selectune_trainable"  # on an attached model: the names of what was trainable before


class OfTuner(Own):
    """The hook by which a tuner is found on its model."""


def carrier(model: nn.Module) -> nn.Module:
    """The module that holds the model's last parameter: what is registered there comes last in `parameters()`.

    So whatever pairs the parameters of two models (averages, target networks) pairs them with a tuner on one as well,
    and the dtype of a model, which is that of its first parameter, stays.
    """
    owners = [m for m in model.modules() if m._parameters and not isinstance(m, torch.jit.ScriptModule)]
    return owners[-1] if owners else model


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter is trainable; in the end each is as it was, without a gradient."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.__dict__[_TRAINABLE] = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        yield
    finally:
        model.__dict__.pop(_TRAINABLE, None)
        for parameter, trainable in before.items():
            parameter.requires_grad = trainable  # not the method: a forgotten tuner may go while a torch.func runs
            parameter.grad = None


def refuse_attached(model: nn.Module) -> None:
    """Raises AlreadyAttachedError for a model that carries a tuner, is part of one that does, or is a copy of one."""
    for name, module in model.named_modules():
        if VALUES not in module._parameters and _TRAINABLE not in module.__dict__:
            continue
        if any(isinstance(p, Weight) for p in module.parameters()):
            where = f'The submodule "{name}"' if name else "The model"
            raise AlreadyAttachedError(
                f"{where} carries a tuner already; call its detach() first: selectune.tuner_of(model).detach()."
            )
    taken = next((name for name, p in model.named_parameters() if isinstance(p, Weight)), None)
    if taken is not None:
        raise AlreadyAttachedError(
            f'The parameter "{taken}" is being trained by the tuner of another model that holds it too. Detach that '
            "one first."
        )
    if any(_TRAINABLE in module.__dict__ or VALUES in module._parameters for module in model.modules()):
        raise AlreadyAttachedError(
            "This model is a copy of one with a tuner: it holds the tuner's vector, and nothing follows it. Make an "
            "ordinary model of it first: selectune.strip(model)."
        )


def owner_of(model: nn.Module) -> Any:
    """The tuner that a model, or a part of it, carries; None for a model without one, and for a copy of one with."""
    for module in model.modules():
        for hook in module._load_state_dict_post_hooks.values():
            if isinstance(hook, OfTuner):
                return hook.owner
    return None


def strip(model: nn.Module) -> nn.Module:
    """Makes an ordinary model of a copy of an attached one, in place, and returns it: its weights are the tuned ones.

    A deep copy, or a model out of a pickle, holds the tuner's vector, which nothing follows there, and frozen weights.
    Afterwards parameters are trainable as they were before attach, and a tuner can be attached. Raises TunerError for
    a model whose own tuner is on: `detach()` takes that off.

    >>> import copy, torch, selectune as st
    >>> model = torch.nn.Linear(8, 4)
    >>> tuner = st.attach(model, st.id3(budget=6, steps=3))
    >>> [name for name, _ in st.strip(copy.deepcopy(model)).named_parameters()]
    ['weight', 'bias']
    """
    if owner_of(model) is not None:
        raise TunerError("This model's own tuner is on. Take it off with selectune.tuner_of(model).detach().")
    for root in list(model.modules()):
        for name in root.__dict__.pop(_TRAINABLE, ()):
            parameter = dict(root.named_parameters()).get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
    sweep(model)
    return model


def sweep(model: nn.Module) -> None:
    """Takes off whatever of a tuner is on a model: vector, hooks, and weights that are followed."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, parameter in list(module._parameters.items()):
            if is_own(name):
                del module._parameters[name]
            elif parameter is not None:
                let_go(parameter)
        hooks = module._state_dict_hooks, module._load_state_dict_post_hooks
        for held in (module._forward_pre_hooks, module._forward_hooks, *hooks):
            for key in [key for key, hook in held.items() if ours(hook) or hook in (hide_vector, expect_no_vector)]:
                del held[key]
                module._forward_hooks_always_called.pop(key, None)


def hide_vector(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The state dict of an attached model is that of an ordinary tuned model."""
    del module, metadata
    for key in [k for k in state if k.startswith(prefix) and is_own(k)]:
        del state[key]


def expect_no_vector(module: nn.Module, incompatible: Any) -> None:
    """A state dict without the vector lacks nothing."""
    del module
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not is_own(k)]
