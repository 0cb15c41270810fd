"""Inputs that need not be saved: those an elementwise node before can give again from what it keeps anyway.

The weight gradient of a linear layer needs its input. Where that is the output of an activation, a
layer norm or a product of two tensors, the node that made it holds its own inputs until its backward, which comes
after the linear layer's; so the output is made again, bit for bit, for one elementwise pass, and the
largest activation of a transformer's MLP is not kept twice.
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

_last = threading.local()  # .made: the node whose output was made last, and that output

# by the name of the node: its output out of what it saved, and the names of that
OUTPUTS: dict[str, tuple[Callable[[Any], Tensor], tuple[str, ...]]] = {
    "GeluBackward0": (
        lambda node: ops.into_scratch(torch.ops.aten.gelu, node._saved_self, approximate=node._saved_approximate),
        ("self",),
    ),
    "SiluBackward0": (lambda node: ops.into_scratch(torch.ops.aten.silu, node._saved_self), ("self",)),
    "MulBackward0": (lambda node: node._saved_self * node._saved_other, ("self", "other")),
    "SparseLayerNormBackward": (lambda node: _layer_norm(node), ()),
}


def source(x: Tensor) -> Any | None:
    """The node that can give `x` again, or None: then x is to be saved.

    Tensors that are saved through somebody's hooks (checkpointing, offloading) may be looked at only once; so neither
    the node's own nor those of whoever asks are, and x may cross the border of a checkpointed region.
    """
    node: Any = x.grad_fn
    if node is None or x._version != 0 or saved_tensors_are_hooked():  # changed in place since: no longer its output
        return None
    if node.name() not in OUTPUTS or not _kept(node, OUTPUTS[node.name()][1]):
        return None
    if node.name() == "MulBackward0" and (node._saved_self is None or node._saved_other is None):
        return None  # a factor that needs no gradient was not kept, or is a number
    return node


def _kept(node: Any, names: tuple[str, ...]) -> bool:
    return kept_plain(node, *names) if names else node.kept_plain


def rebuilt(node: Any) -> Tensor:
    """The output of the node, with the bits it had; valid until another's is rebuilt.

    Memory that is used again carries a new version then, so nothing made of the last one is taken for this one.
    """
    last = getattr(_last, "made", None)
    if last is not None and last[0] is node:
        return last[1]
    with torch.no_grad():
        made = OUTPUTS[node.name()][0](node)
    _last.made = (node, made)
    return made


def forget() -> None:
    """Lets go of what one backward pass keeps from layer to layer."""
    _last.made = None


def _layer_norm(node: Any) -> Tensor:
    x, _, _, weight, bias = node.saved_tensors
    return F.layer_norm(x, weight.shape, weight, bias, node.eps)
