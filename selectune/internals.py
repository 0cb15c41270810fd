"""What selectune uses of torch that torch does not promise to keep: every private name, in this one file.

`tests/test_internals.py` says what each must do, and runs on the oldest and on the newest torch (`make test-torch`).
A torch that has a name no longer is told by its version here, at import, and not by a wrong gradient later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "after_backward",
    "backward_id",
    "data_is_all_there",
    "dispatch_modes",
    "forget",
    "own_apply",
    "saved_tensors_are_hooked",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "will_reach",
]


def _name(path: str) -> Any:
    """torch.`path`, or an error that says which torch lacks it."""
    try:
        return functools.reduce(getattr, path.split("."), torch)
    except AttributeError:
        raise ImportError(
            f"selectune uses torch.{path}, which torch {torch.__version__} does not have. README.md says which "
            "versions of torch are tested; install one of these."
        ) from None


# The number of the backward pass that this thread is in, or -1.
backward_id: Callable[[], int] = _name("_C._current_graph_task_id")

# Whether the backward pass that this thread is in will come to a node.
will_reach: Callable[[Any], bool] = _name("_C._will_engine_execute_node")

# How many dispatch modes are in place.
dispatch_modes: Callable[[], int] = _name("_C._len_torch_dispatch_stack")

# The hooks that saved tensors go through, or None; the argument: also while tracing.
_saved_tensor_hooks: Callable[[bool], Any] = _name("_C._autograd._top_saved_tensors_default_hooks")

# Functions over nested tuples, lists and dicts.
tree_map: Callable[..., Any] = _name("utils._pytree.tree_map")
tree_map_only: Callable[..., Any] = _name("utils._pytree.tree_map_only")
tree_leaves: Callable[..., list[Any]] = _name("utils._pytree.tree_leaves")
tree_iter: Callable[..., Any] = _name("utils._pytree.tree_iter")


def after_backward(call: Callable[[], None]) -> None:
    """Calls `call` when the backward pass that this thread is in is over."""
    _name("autograd.Variable")._execution_engine.queue_callback(call)


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves goes through somebody's hooks."""
    return _saved_tensor_hooks(False) is not None


def data_is_all_there() -> Any:
    """A context in which a tensor without memory (`meta`) is taken to hold no zeros where a count depends on them."""
    from torch.fx.experimental import _config

    patch: Any = cast(Any, _config).patch
    return patch(meta_nonzero_assume_all_nonzero=True)


def own_apply() -> Any:
    """What stands as `torch.autograd.Function.apply`, not yet bound: a classmethod up to torch 2.13, a
    descriptor in C from 2.14 on. `own_apply().__get__(None, cls)` is `cls.apply` with either."""
    return Function.__dict__["apply"]


def forget(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """The optimizer's state of a parameter is again what it was before the first step.

    Any optimizer makes a state that is missing; but Adagrad made it in its constructor only, up to torch 2.12 at most.
    """
    state = optimizer.state.pop(parameter, None)
    if state and isinstance(optimizer, torch.optim.Adagrad) and torch.__version__ < "2.13":
        start = optimizer.defaults["initial_accumulator_value"]
        optimizer.state[parameter] = {"step": state["step"] * 0, "sum": torch.full_like(state["sum"], start)}
