"""What selectune uses of torch that torch does not promise to keep: every private name, in this one file.

`tests/test_internals.py` says what each must do, and runs on the oldest and on the newest torch (`make test-torch`).
A torch that has a name no longer is told by its version here, at import, and not by a wrong gradient later.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "SCRIPTED", "TorchDispatchMode", "WRAPPING", "after_backward", "backward_id", "can_share", "dispatch_modes",
    "fake_mode", "fake_of", "forget", "go_on_compiling", "in_backward", "in_transform", "kept_plain", "never_compiled",
    "outside_transforms", "plain_parameter", "saved_tensors_are_hooked", "stop_compiling", "tree_iter", "tree_leaves",
    "tree_map", "tree_map_only", "will_reach", "without_dispatch",
]  # fmt: skip


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

# Tensor subclasses are taken for plain tensors while this context is entered.
without_dispatch: Callable[[], AbstractContextManager[None]] = _name("_C.DisableTorchFunctionSubclass")

# Whether the calling code runs inside vmap, grad or another transform of torch.func.
in_transform: Callable[[], bool] = _name("_C._are_functorch_transforms_active")

# Within this context no transform of torch.func is on: what is made there is made for the ordinary graph.
outside_transforms: Callable[[], AbstractContextManager[Any]] = _name(
    "_functorch.pyfunctorch.temporarily_clear_interpreter_stack"
)

# What TorchScript makes of functions and methods: their calls ask no __torch_function__.
SCRIPTED: tuple[Any, ...] = (_name("_C.ScriptFunction"), _name("_C.ScriptMethod"))

# Where vmap and grad of torch.func wrap tensors they are given: that asks no __torch_function__ either.
WRAPPING: tuple[tuple[Any, str], ...] = (
    (_name("_functorch.vmap"), "_add_batch_dim"),
    (_name("_functorch.eager_transforms"), "_wrap_for_grad"),
)

# How torch.compile decides about a frame of code.
_frames: Any = _name("_C._dynamo.eval_frame")

# Whether a tensor can take another's place in memory: modules ask it of parameters that are moved or cast.
can_share: Callable[..., bool] = _name("_has_compatible_shallow_copy_type")

# Functions over nested tuples, lists and dicts.
tree_map: Callable[..., Any] = _name("utils._pytree.tree_map")
tree_map_only: Callable[..., Any] = _name("utils._pytree.tree_map_only")
tree_leaves: Callable[..., list[Any]] = _name("utils._pytree.tree_leaves")
tree_iter: Callable[..., Any] = _name("utils._pytree.tree_iter")


def in_backward() -> bool:
    """Whether the calling code runs inside a backward pass."""
    return backward_id() != -1


def after_backward(call: Callable[[], None]) -> None:
    """Calls `call` when the backward pass that this thread is in is over."""
    _name("autograd.Variable")._execution_engine.queue_callback(call)


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves goes through somebody's hooks."""
    return _saved_tensor_hooks(False) is not None


def kept_plain(node: Any, *names: str) -> bool:
    """Whether a node of torch keeps all of these as they were, not through hooks that allow one look only."""
    raw: list[Any] = [getattr(node, f"_raw_saved_{name}", None) for name in names]
    return all(hasattr(one, "unpack_hook") and one.unpack_hook is None for one in raw)


def plain_parameter(data: torch.Tensor, trainable: bool) -> Any:
    """What stands for a parameter in a pickle, as torch's own parameters say it."""
    return _name("_utils._rebuild_parameter"), (data, trainable, OrderedDict())


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
    """Takes back `stop_compiling`."""
    if before is not None:
        _frames.set_eval_frame(before)


@contextmanager
def fake_mode() -> Iterator[Any]:
    """Within this context tensors have a shape, a dtype and a device and hold no data; real ones may be mixed in.

    torch logs a traceback beside each exception there; the exception says it all.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with cast(Any, FakeTensorMode)(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        log.setLevel(level)


def fake_of(mode: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of this mode like the given one, which claims to be on the device."""
    from torch._subclasses.fake_tensor import FakeTensor

    return cast(Any, FakeTensor)(mode, tensor.detach().to("meta"), device)


def forget(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """The optimizer's state of a parameter is again what it was before the first step.

    Any optimizer makes a state that is missing; but Adagrad made it in its constructor only, up to torch 2.12 at most.
    """
    state = optimizer.state.pop(parameter, None)
    if state and isinstance(optimizer, torch.optim.Adagrad) and torch.__version__ < "2.13":
        start = optimizer.defaults["initial_accumulator_value"]
        optimizer.state[parameter] = {"step": state["step"] * 0, "sum": torch.full_like(state["sum"], start)}
