"""Where a tuner's vector is put on a model, and how a copy of such a model becomes an ordinary one again."""

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

_TRAINABLE = "_selectune_trainable"  # on an attached model: names of the parameters that were trainable


class OfTuner(Own):
    """The hook that leads from a model to its tuner."""


class CopiedTuner:
    """What a copy or a pickle of a module has in place of a tuner that the module held: it trains nothing.

    The copy of an attached model is an ordinary one, so any use of this raises TunerError.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TunerError(
            f"This tuner came along as a module was copied or pickled, and trains nothing, so it has no {name}. The "
            "copied model is an ordinary one; attach to it anew, or use the tuner of the original."
        )


def carrier(model: nn.Module) -> nn.Module:
    """The module that holds the model's last parameter: a parameter registered there comes last in `parameters()`.

    So code that pairs the parameters of two models (averages, target networks) still pairs them correctly, and the
    model keeps its dtype, which is that of its first parameter.
    """
    owners = [m for m in model.modules() if m._parameters and not isinstance(m, torch.jit.ScriptModule)]
    return owners[-1] if owners else model


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freezes all parameters; afterwards each is trainable as it was, and has no gradient."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.__dict__[_TRAINABLE] = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        yield
    finally:
        model.__dict__.pop(_TRAINABLE, None)
        for parameter, trainable in before.items():
            parameter.requires_grad = trainable  # not the method: garbage collection may come here within torch.func
            parameter.grad = None


def refuse_attached(model: nn.Module) -> None:
    """Raises AlreadyAttachedError if the model, a part of it or a model around it carries a tuner, or it is a copy."""
    for name, module in model.named_modules():
        if VALUES not in module._parameters and _TRAINABLE not in module.__dict__:
            continue
        if any(isinstance(p, Weight) for p in module.parameters()) or owner_of(module) is not None:
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
            "This model is a copy of one with a tuner: it holds the tuner's vector, which has no effect here. Make it "
            "an ordinary model first: selectune.strip(model)."
        )


def owner_of(model: nn.Module) -> Any:
    """The tuner that a model or a part of it carries; None without one, and for a copy of a model with one."""
    for module in model.modules():
        for hook in module._load_state_dict_post_hooks.values():
            if isinstance(hook, OfTuner):
                return hook.owner
    return None


def strip(model: nn.Module) -> nn.Module:
    """Turns a copy of an attached model into an ordinary model with the tuned weights, in place, and returns it.

    A deep copy, or a model from a pickle, has frozen weights and holds the tuner's vector, which has no effect there.
    Afterwards parameters are trainable as they were before attach, and a tuner can be attached. Raises TunerError for
    a model that carries its own tuner: `detach()` takes that off.

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
    """Takes every trace of a tuner off a model: the vector, the hooks, and the class of its weights."""
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
    for key in [k for k in state if k.startswith(prefix) and is_own(k)]:
        del state[key]


def expect_no_vector(module: nn.Module, incompatible: Any) -> None:
    """A state dict without the vector is complete."""
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not is_own(k)]
