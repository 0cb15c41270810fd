"""Inputs that need not be saved, because the elementwise node that made them can make them again.

The weight gradient of a linear layer needs its input. If that is the output of an activation, a layer norm or a
product of two tensors, the node that made it keeps its own inputs until its backward, which runs after the linear
layer's. So the output is computed again, bit for bit, in one elementwise pass, and the largest activation of a
transformer's MLP is not kept twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selectune import ops
from selectune.internals import kept_plain, saved_tensors_are_hooked

_last = threading.local()  # .rebuilt: the node whose output was rebuilt last, and that output

# {name of a node: (its output from its saved tensors, their names)}
OUTPUTS: dict[str, tuple[Callable[[Any], Tensor], tuple[str, ...]]] = {
    "GeluBackward0": (
        lambda node: ops.into_scratch(torch.ops.aten.gelu, node._saved_self, approximate=node._saved_approximate),
        ("self",),
    ),
    "SiluBackward0": (lambda node: ops.into_scratch(torch.ops.aten.silu, node._saved_self), ("self",)),
    "MulBackward0": (lambda node: node._saved_self * node._saved_other, ("self", "other")),
    "SparseLayerNormBackward": (lambda node: _layer_norm(node), ()),
}


_OF_WEIGHTS = ("MulBackward0", "SparseLayerNormBackward")  # what they keep may be a weight


def source(x: Tensor, weights_stay: bool = True) -> Any | None:
    """The node that can make `x` again; None if x must be saved, or if a weight is needed that does not stay in memory.

    Tensors that are saved through hooks (checkpointing, offloading) may be read only once. So the answer is None if
    hooks are active now, or were when the node saved its inputs.
    """
    node: Any = x.grad_fn
    if node is None or x._version != 0 or saved_tensors_are_hooked():  # no longer the node's output if changed in place
        return None
    if not weights_stay and node.name() in _OF_WEIGHTS:
        return None
    if node.name() not in OUTPUTS or not _kept(node, OUTPUTS[node.name()][1]):
        return None
    if node.name() == "MulBackward0" and (node._saved_self is None or node._saved_other is None):
        return None  # a factor that needs no gradient was not kept, or is a number
    return node


def _kept(node: Any, names: tuple[str, ...]) -> bool:
    return kept_plain(node, *names) if names else node.kept_plain


def rebuilt(node: Any) -> Tensor:
    """The output of the node, with the bits it had; valid until another node's is rebuilt.

    Reused memory gets a new version, so nothing derived from the last content is mistaken for this one.
    """
    last = getattr(_last, "rebuilt", None)
    if last is not None and last[0] is node:
        return last[1]
    with torch.no_grad():
        output = OUTPUTS[node.name()][0](node)
    _last.rebuilt = (node, output)
    return output


def forget() -> None:
    """Drops what a backward pass keeps from layer to layer."""
    _last.rebuilt = None


def _layer_norm(node: Any) -> Tensor:
    x, _, _, weight, bias = node.saved_tensors
    return F.layer_norm(x, weight.shape, weight, bias, node.eps)
