"""Every private name of torch that selectune uses; torch does not promise to keep them.

`tests/test_internals.py` checks what each must do, on the oldest and the newest torch (`make test-torch`). If a torch
lacks a name, importing this file raises an error with its version, so that no gradient is wrong later.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "SCRIPTED", "TorchDispatchMode", "WRAPPING", "after_backward", "averages", "backward_id", "can_share",
    "class_before", "dispatch_modes", "fake_mode", "fake_of", "fast_int8", "forget", "fsdp_modules", "fsdp_syncs",
    "fsdp_weights", "go_on_compiling", "in_backward", "in_transform", "is_fake", "is_sharded", "joining",
    "int8_product", "kept_plain", "never_compiled", "outside_transforms", "part_of", "pause", "plain_parameter",
    "resume", "saved_tensors_are_hooked", "stop_compiling", "tree_iter", "tree_leaves", "tree_map", "tree_map_only",
    "versions_kept", "will_reach", "without_dispatch",
]  # fmt: skip


def _name(path: str) -> Any:
    """torch.`path`; ImportError with torch's version if it does not exist."""
    try:
        return functools.reduce(getattr, path.split("."), torch)
    except AttributeError:
        raise ImportError(
            f"selectune uses torch.{path}, which torch {torch.__version__} does not have. README.md says which "
            "versions of torch are tested; install one of these."
        ) from None


# The number of the backward pass that runs in this thread, or -1.
backward_id: Callable[[], int] = _name("_C._current_graph_task_id")

# A context after which tensors have the version numbers that they had before it, whatever was written in it.
versions_kept: Callable[..., AbstractContextManager[None]] = _name(
    "autograd.grad_mode._unsafe_preserve_version_counter"
)

# Whether the backward pass that runs in this thread will reach a node.
will_reach: Callable[[Any], bool] = _name("_C._will_engine_execute_node")

# Whether this processor multiplies integers of 8 bits exactly and fast (AVX-512 VNNI, AMX).
_vnni: Callable[[], bool] = _name("cpu._is_vnni_supported")

# The product of two matrices of int8, in int32; wrong for a first matrix of one row.
int8_product: Callable[..., torch.Tensor] = _name("_int_mm")

# How many dispatch modes are active.
dispatch_modes: Callable[[], int] = _name("_C._len_torch_dispatch_stack")

# The hooks on saved tensors, or None; the argument: also while tracing.
_saved_tensor_hooks: Callable[[bool], Any] = _name("_C._autograd._top_saved_tensors_default_hooks")

# A context in which tensor subclasses are treated as plain tensors.
without_dispatch: Callable[[], AbstractContextManager[None]] = _name("_C.DisableTorchFunctionSubclass")

# Whether the calling code runs inside vmap, grad or another transform of torch.func.
in_transform: Callable[[], bool] = _name("_C._are_functorch_transforms_active")

# A context without torch.func's transforms: what is made there belongs to the ordinary graph.
outside_transforms: Callable[[], AbstractContextManager[Any]] = _name(
    "_functorch.pyfunctorch.temporarily_clear_interpreter_stack"
)

# TorchScript's functions and methods, whose calls bypass __torch_function__.
SCRIPTED: tuple[Any, ...] = (_name("_C.ScriptFunction"), _name("_C.ScriptMethod"))

# Where torch.func's vmap and grad wrap their tensors, which bypasses __torch_function__ too.
WRAPPING: tuple[tuple[Any, str], ...] = (
    (_name("_functorch.vmap"), "_add_batch_dim"),
    (_name("_functorch.eager_transforms"), "_wrap_for_grad"),
)

# torch.compile's decisions about frames of code.
_frames: Any = _name("_C._dynamo.eval_frame")

# Whether a tensor can take another's place in memory; modules ask this when they move or cast parameters.
can_share: Callable[..., bool] = _name("_has_compatible_shallow_copy_type")

# Functions over nested tuples, lists and dicts.
tree_map: Callable[..., Any] = _name("utils._pytree.tree_map")
tree_map_only: Callable[..., Any] = _name("utils._pytree.tree_map_only")
tree_leaves: Callable[..., list[Any]] = _name("utils._pytree.tree_leaves")
tree_iter: Callable[..., Any] = _name("utils._pytree.tree_iter")


# The DistributedDataParallel whose forward is running, or None.
_active_ddp: Callable[[], Any] = _name("nn.parallel.DistributedDataParallel._get_active_ddp_module")


def averages(parameter: torch.Tensor) -> bool | None:
    """Whether the DistributedDataParallel whose forward is running averages this gradient; None if there is none."""
    around = _active_ddp()
    return None if around is None else any(p is parameter for p in around._module_parameters)


def joining() -> bool:
    """Whether the DistributedDataParallel whose forward is running lets ranks run out of batches (its `join`)."""
    around = _active_ddp()
    return around is not None and bool(around._join_config.enable)


def pause(around: Any) -> bool:
    """Keeps a DistributedDataParallel, before its forward, from averaging gradients; whether it would have done so."""
    would, around.require_backward_grad_sync = around.require_backward_grad_sync, False
    return would


def resume(around: Any, would: bool) -> None:
    """Undoes `pause` after that forward; the next one synchronises buffers as if nothing had happened."""
    around.require_backward_grad_sync = around.require_forward_param_sync = would


# -- FSDP2 (torch.distributed.fsdp.fully_shard)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported, so there are none
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor that this rank holds: the same memory, whatever FSDP2 has put there."""
    return cast(Any, tensor)._local_tensor.detach()


def fsdp_modules(model: torch.nn.Module) -> list[Any]:
    """The modules of a model that were given to fully_shard, outermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _fsdp_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # up to torch 2.12


class FsdpWeight:
    """What FSDP2 keeps of one parameter that it shards."""

    def __init__(self, record: Any) -> None:
        self._record = record

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The sharded parameter, a DTensor, which modules hold between two passes."""
        return self._record.sharded_param

    @property
    def used(self) -> torch.nn.Parameter | None:
        """The whole parameter, which modules hold in a pass. It is made once; between two passes it has no memory."""
        return getattr(self._record, "_unsharded_param", None)

    @property
    def is_whole(self) -> bool:
        """Whether the whole parameter has its memory and its numbers now."""
        return self._record.sharded_state.name == "UNSHARDED"

    @property
    def offloaded(self) -> bool:
        """Whether the part lies in the CPU's memory while a GPU computes (CPUOffloadPolicy)."""
        return bool(self._record.offload_to_cpu)


def fsdp_weights(module: Any) -> list[FsdpWeight]:
    """The parameters that fully_shard shards with this module."""
    return [FsdpWeight(record) for group in _fsdp_groups(module) for record in group.fsdp_params]


def fsdp_syncs(module: Any) -> bool:
    """Whether the next backward pass averages gradients (`set_requires_gradient_sync`)."""
    return all(group.reduce_grads for group in _fsdp_groups(module))


def class_before(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class that a module had before fully_shard, which puts one of its own in its place."""
    own, *kinds = type(module).__mro__
    return kinds[1] if kinds[0].__name__ == "FSDPModule" else own


@functools.cache
def fast_int8() -> bool:
    """Whether a product of int8 is exact here, and several times as fast as one of float32."""
    return _vnni()


def in_backward() -> bool:
    """Whether the calling code runs inside a backward pass."""
    return backward_id() != -1


def after_backward(call: Callable[[], None]) -> None:
    """Calls `call` when the backward pass that runs in this thread has ended."""
    _name("autograd.Variable")._execution_engine.queue_callback(call)


def saved_tensors_are_hooked() -> bool:
    """Whether hooks are active on the tensors that autograd saves."""
    return _saved_tensor_hooks(False) is not None


def kept_plain(node: Any, *names: str) -> bool:
    """Whether a torch node saved all of these plainly, not through hooks, which allow only one read."""
    raw: list[Any] = [getattr(node, f"_raw_saved_{name}", None) for name in names]
    return all(hasattr(one, "unpack_hook") and one.unpack_hook is None for one in raw)


def plain_parameter(data: torch.Tensor, trainable: bool) -> Any:
    """The form of a parameter in a pickle, as torch's own parameters give it."""
    return _name("_utils._rebuild_parameter"), (data, trainable, OrderedDict())


def never_compiled(function: Any) -> Any:
    """Marks a function that torch.compile must neither trace nor inline; returns the function."""
    skip, default = _frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT
    _frames.set_code_exec_strategy(function.__code__, _frames._FrameExecStrategy(skip, default))
    function._torchdynamo_disable = True
    return function


@never_compiled
def stop_compiling() -> Any:
    """Runs this thread's code uncompiled from now on; returns what `go_on_compiling` takes, None if it did already."""
    return _frames.set_eval_frame(None)


@never_compiled
def go_on_compiling(before: Any) -> None:
    """Undoes `stop_compiling`."""
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


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no data (`fake_mode`)."""
    return type(tensor).__name__ == "FakeTensor"


def forget(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """Resets an optimizer's state of a parameter to that before the first step.

    Optimizers make a missing state again; but up to torch 2.12, Adagrad makes it only in its constructor.
    """
    state = optimizer.state.pop(parameter, None)
    if state and isinstance(optimizer, torch.optim.Adagrad) and torch.__version__ < "2.13":
        start = optimizer.defaults["initial_accumulator_value"]
        optimizer.state[parameter] = {"step": state["step"] * 0, "sum": torch.full_like(state["sum"], start)}
