"""A model held still while its weights are scored: whatever is changed for that comes back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from selectune.bits import int_view, same_bits
from selectune.scope import ScopedTensor

_LARGEST = {t: torch.iinfo(t).max for t in (torch.int16, torch.int32, torch.int64)} | {
    torch.uint8: 127
}  # all but the sign


@contextmanager
def still(model: nn.Module, tensors: Sequence[ScopedTensor], train_mode: bool) -> Iterator[None]:
    """The tensors alone require gradients, the model is in eval (or train) mode; what was before comes back."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        model.train(train_mode)
        for parameter in trainable:
            parameter.requires_grad_(False)
        for tensor in tensors:
            tensor.parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in trainable.items():
            parameter.requires_grad_(before)
        for tensor in tensors:
            tensor.parameter.grad = None
        for module, mode in training.items():
            module.training = mode
        with torch.no_grad():
            for buffer, old in buffers:
                if not same_bits(buffer, old):
                    buffer.copy_(old)


@contextmanager
def absolute(model: nn.Module) -> Iterator[None]:
    """Every floating parameter of the model without its sign bit; 1 byte a weight for the signs meanwhile.

    Signs are taken off and put back as bits, so -0.0 and NaN come back too, in every dtype.
    """
    signs = []
    try:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                whole = int_view(parameter)
                signs.append((whole, whole > _LARGEST[whole.dtype] if whole.dtype == torch.uint8 else whole < 0))
                whole.bitwise_and_(_LARGEST[whole.dtype])
        yield
    finally:
        for whole, negative in signs:
            whole.bitwise_xor_(torch.where(negative, ~_LARGEST[whole.dtype], 0).to(whole.dtype))


@contextmanager
def drawn(tensors: Sequence[ScopedTensor], std: float, seed: int) -> Iterator[None]:
    """Matrices that are all 0 hold draws from N(0, std^2) meanwhile, seeded; vectors (biases) stay 0."""
    empty = [t.parameter.detach() for t in tensors if t.parameter.ndim >= 2 and not bool(t.parameter.any())]
    olds = [weight.clone() for weight in empty]
    generator = torch.Generator().manual_seed(seed)
    try:
        for weight in empty:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        yield
    finally:
        for weight, old in zip(empty, olds, strict=True):
            weight.copy_(old)
