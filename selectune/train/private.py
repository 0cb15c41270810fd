"""What the engine uses of torch that torch does not document; `tests/train/test_private.py` says where a name is gone.

Nothing else in `selectune.train` names a private part of torch, so a new release is looked up in one place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_parameter
from torch.autograd import Function, Variable

_C: Any = torch._C


def without_dispatch() -> AbstractContextManager[None]:
    """Tensor subclasses are taken for plain tensors meanwhile."""
    return _C.DisableTorchFunctionSubclass()


def in_transform() -> bool:
    """Whether the calling code runs inside vmap, grad or another transform of torch.func."""
    return _C._are_functorch_transforms_active()


def plain_parameter(data: Tensor, trainable: bool) -> Any:
    """What stands for a parameter in a pickle, as torch's own parameters say it."""
    return _rebuild_parameter, (data, trainable, OrderedDict())


# -- backward passes


def backward_pass() -> int:
    """The number of the backward pass that the calling code runs in; -1 outside."""
    return _C._current_graph_task_id()


def in_backward() -> bool:
    """Whether the calling code runs inside a backward pass."""
    return backward_pass() != -1


def comes_to(node: Any) -> bool:
    """Whether this backward pass comes to the node: it does not where only gradients of inputs are asked for."""
    return _C._will_engine_execute_node(node)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Calls back when the outermost backward pass that runs now is done."""
    Variable._execution_engine.queue_callback(callback)  # pyright: ignore[reportAttributeAccessIssue]


# -- what nodes save


def saves_through_hooks() -> bool:
    """Whether tensors that are saved now go through somebody's hooks: under checkpointing, offloading."""
    return _C._autograd._top_saved_tensors_default_hooks(False) is not None


def kept_plain(node: Any, *names: str) -> bool:
    """Whether a node of torch keeps all of these as they were, not through hooks that allow one look only."""
    raw: list[Any] = [getattr(node, f"_raw_saved_{name}", None) for name in names]
    return all(hasattr(one, "unpack_hook") and one.unpack_hook is None for one in raw)


# -- calls that ask no __torch_function__

apply_of: Any = Function.__dict__["apply"]  # torch's own

SCRIPTED: tuple[Any, ...] = (_C.ScriptFunction, _C.ScriptMethod)


# -- torch.compile

_frames: Any = _C._dynamo.eval_frame


def never_compiled(function: Any) -> Any:
    """The function itself, which torch.compile neither traces nor inlines: it breaks the graph there."""
    skip, default = _frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT
    _frames.set_code_exec_strategy(function.__code__, _frames._FrameExecStrategy(skip, default))
    function._torchdynamo_disable = True
    return function


@never_compiled
def stop_compiling() -> Any:
    """From here on code of this thread runs as it is written; what `go_on_compiling` takes, None if it did anyway."""
    return _frames.set_eval_frame(None)


@never_compiled
def go_on_compiling(before: Any) -> None:
    if before is not None:
        _frames.set_eval_frame(before)
