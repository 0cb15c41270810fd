"""What an adapter is put on with, and what putting it on gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selectune.adapters.roles import Role
from selectune.errors import ConfigError


class Kept(Protocol):
    """What an adapter keeps between two steps beside its tensors, for checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """{"info": JSON values, "tensors": {key: tensor}}."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`, on the same adapter."""
        ...


@dataclass
class Injected:
    """An adapter on a model: the model to be trained, and how to take the adapter off or fold it in."""

    model: nn.Module
    remove: Callable[[], None]
    merge: Callable[[], None] | None = None
    after_step: Callable[[int], None] | None = None  # after the optimizer's step, before zero_grad
    kept: Kept | None = None  # the state that `after_step` keeps between steps


@dataclass(frozen=True)
class Wanted:
    """An adapter of our own before it is put on: its model, options, the model's roles, and the run's steps."""

    model: nn.Module
    kind: str
    options: Mapping[str, Any]
    found: Sequence[Role]
    layers: Sequence[str] = ()  # names of the linear layers that `targets` selects
    steps: int | None = None  # None: nothing but the tuner may write the adapter's tensors


def put_children(
    model: nn.Module,
    name: str,
    children: Mapping[str, tuple[nn.Module, Tensor]],
    hooks: Callable[[str, nn.Module, nn.Module], Sequence[RemovableHandle]],
    more: Sequence[RemovableHandle] = (),
) -> Callable[[], None]:
    """Makes each module in `children` a child `name` of the module with that path; returns what takes them off again.

    `children`: {path: (the child, a weight of the base beside it)}. The child moves to the weight's device, in
    float32 if the weight is half precision, as peft does. `hooks(path, module, child)` registers what runs it; `more`
    are other hooks of the adapter. Raises ConfigError if a module has such a child already.
    """
    modules = {path: model.get_submodule(path) for path in children}
    for path, module in modules.items():
        if hasattr(module, name):
            raise ConfigError(f'"{path}" has an adapter already; take it off first.')
    handles = list(more)
    for path, (child, beside) in children.items():
        dtype = torch.promote_types(beside.dtype, torch.float32)
        modules[path].add_module(name, child.to(beside.device, dtype).train(modules[path].training))
        handles += hooks(path, modules[path], child)

    def remove() -> None:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            del module._modules[name]

    return remove
