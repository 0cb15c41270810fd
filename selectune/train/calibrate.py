"""Scores that read single examples: summed before training, one dense gradient alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selectune.errors import CalibrationError
from selectune.scope import ScopedTensor
from selectune.types import Score

Loss = Callable[[nn.Module, Any], Tensor]


def calibrate(
    model: nn.Module,
    score: Score,
    tensors: Sequence[ScopedTensor],
    batches: Iterable[Any] | None,
    loss: Loss | None,
) -> list[Tensor]:
    """The score of every entry, summed over single examples: a float per entry in scope.

    `batches` yields one example at a time. labels="data": `loss(model, example)` is a scalar, one
    backward pass an example. labels="model": it gives logits (1, classes); every class c has weight
    p(c), one backward pass a class. The model is in eval mode meanwhile.
    """
    if batches is None or loss is None:
        raise CalibrationError(
            f"The score '{score.name}' reads single examples: give attach(..., calibration=batches, loss=callable), "
            "batches of one example each, and a callable (model, batch) -> loss."
        )
    wanted = int(score.parameters.get("examples", 0)) or None
    sums = [torch.zeros(t.parameter.shape, dtype=_wide(t), device=t.parameter.device) for t in tensors]
    weight_of_class = [1.0]

    def fold(tensor: ScopedTensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                gradient = gradient.to_dense() if gradient.is_sparse else gradient
                wide = sums[tensor.index].dtype
                contribution = score(parameter.detach().to(wide), gradient.to(wide))
                sums[tensor.index].add_(contribution, alpha=weight_of_class[0])

        return hook

    trainable = [t.parameter.requires_grad for t in tensors]
    training = {module: module.training for module in model.modules()}
    handles = []
    try:
        model.eval()
        for tensor in tensors:
            tensor.parameter.requires_grad_(True)
            handles.append(tensor.parameter.register_post_accumulate_grad_hook(fold(tensor)))
        seen = 0
        for batch in batches:
            if seen == wanted:
                break
            seen += 1
            for part, weight in _losses(loss(model, batch), str(score.parameters.get("labels", "data"))):
                weight_of_class[0] = weight
                part.backward(retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
        for tensor, before in zip(tensors, trainable, strict=True):
            tensor.parameter.requires_grad_(before)
            tensor.parameter.grad = None
        for module, mode in training.items():
            module.training = mode
    _check(seen, wanted, sums, tensors)
    return sums


def _losses(result: Tensor, labels: str) -> Iterable[tuple[Tensor, float]]:
    """The scalars to run backward from, and the weight of each in the sum."""
    if labels == "data":
        if result.numel() != 1:
            raise CalibrationError(f'With labels="data" the loss must be a scalar, got shape {tuple(result.shape)}.')
        return [(result.reshape(()), 1.0)]
    if result.ndim != 2 or result.shape[0] != 1 or result.shape[1] < 2:
        raise CalibrationError(
            'With labels="model" the callable must return logits of one example over at least two classes, shape '
            f'(1, classes), got {tuple(result.shape)}. A regression has no classes: use labels="data".'
        )
    log_p = torch.log_softmax(result[0], 0)
    return [(-log_p[c], float(log_p[c].detach().exp())) for c in range(result.shape[1])]


def _check(seen: int, wanted: int | None, sums: Sequence[Tensor], tensors: Sequence[ScopedTensor]) -> None:
    if seen == 0:
        raise CalibrationError("calibration= yielded no batch; the score needs at least one example.")
    if wanted is not None and seen < wanted:
        raise CalibrationError(
            f"calibration= yielded {seen} of the {wanted} examples asked for. Give more, or lower examples=."
        )
    if not any(bool(s.any()) for s in sums):
        raise CalibrationError(
            f"No example sent a gradient into the {len(tensors)} tensors in scope: is the loss a function of the model?"
        )


def _wide(tensor: ScopedTensor) -> torch.dtype:
    return torch.float64 if tensor.parameter.dtype == torch.float64 else torch.float32
