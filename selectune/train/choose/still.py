"""Keeps a model unchanged while its weights are scored: every temporary change is undone, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from selectune.bits import int_view, same_bits
from selectune.scope import ScopedTensor

_LARGEST = {torch.uint8: 127, **{t: torch.iinfo(t).max for t in (torch.int16, torch.int32, torch.int64)}}  # no sign bit


@contextmanager
def still(model: nn.Module, tensors: Sequence[ScopedTensor], train_mode: bool) -> Iterator[None]:
    """Lets only these tensors require gradients, in eval (or train) mode; afterwards the model is as it was."""
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
    """Clears the sign bit of every floating parameter for a while; the signs take 1 byte per weight.

    Signs are cleared and set as bits, so -0.0 and NaN come back too, in every dtype.
    """
    signs = []
    try:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                raw = int_view(parameter)
                signs.append((raw, raw > _LARGEST[raw.dtype] if raw.dtype == torch.uint8 else raw < 0))
                raw.bitwise_and_(_LARGEST[raw.dtype])
        yield
    finally:
        for raw, negative in signs:
            raw.bitwise_xor_(torch.where(negative, ~_LARGEST[raw.dtype], 0).to(raw.dtype))


@contextmanager
def drawn(tensors: Sequence[ScopedTensor], std: float, seed: int) -> Iterator[None]:
    """Fills matrices that are all 0 with seeded draws from N(0, std^2) for a while; vectors (biases) stay 0."""
    empty = [t.weight for t in tensors if t.parameter.ndim >= 2 and not bool(t.parameter.any())]
    olds = [weight.clone() for weight in empty]
    generator = torch.Generator().manual_seed(seed)
    try:
        for weight in empty:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        yield
    finally:
        for weight, old in zip(empty, olds, strict=True):
            weight.copy_(old)
