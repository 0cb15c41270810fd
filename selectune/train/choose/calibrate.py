"""Calibrated scores: read from data at fixed weights, with one dense gradient at a time if that suffices.

Every kind (`selectune.types.Reads`) leaves the model as it was, even if something raises: training modes, buffers,
requires_grad, every bit of the weights, and no gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from selectune import bits
from selectune.errors import CalibrationError
from selectune.scope import ScopedTensor
from selectune.train.choose.still import absolute, drawn, still
from selectune.types import Reads, Score

Loss = Callable[..., Tensor]
Batches = Iterable[Any] | Callable[[], Iterable[Any]]

_WANTS = {
    Reads.EXAMPLES: "single examples: give attach(..., calibration=batches, loss=callable), batches of one example "
    "each, and a callable (model, batch) -> loss",
    Reads.BATCHES: "mini-batches: give attach(..., calibration=batches, loss=callable), the callable (model, batch) -> "
    "loss",
    Reads.CURVATURE: "mini-batches: give attach(..., calibration=batches, loss=callable), the callable (model, batch, "
    "temperature=T) -> the loss of the logits divided by T; without temperature where T is 1",
    Reads.FLOW: "the flow of an input of ones: give attach(..., calibration=[ones], loss=callable), the callable "
    "(model, ones) -> the sum of the outputs",
}
_WANTS[Reads.POOLED] = _WANTS[Reads.BATCHES]


def calibrate(
    model: nn.Module,
    score: Score,
    tensors: Sequence[ScopedTensor],
    batches: Batches | None,
    loss: Loss | None,
    seed: int = 0,
) -> list[Tensor]:
    """The scores of all entries: one tensor for each in scope, of its shape.

    EXAMPLES   sum_i f(w, g_i), one backward pass per example; with labels="model" `loss` gives logits
               (1, classes), and every class c counts with weight p(c), one backward pass per class
    BATCHES    sum_b f(w, g_b), one backward pass per mini-batch
    POOLED     f(w, sum_b g_b), one backward pass per mini-batch
    CURVATURE  f(w, H g), g = sum_b g_b and H = sum_b H_b: one backward pass per mini-batch for g, then the
               gradient of <g_b, g> by double backward; holds its graph, g and H g at once
    FLOW       sum_b f(|w|, dR_b/d|w|), R_b = `loss(model, input)` with absolute weights in the whole model

    Memory beside the model: 4 bytes per entry in scope (8 for CURVATURE) and one dense gradient (all of
    them for CURVATURE). The model is in eval mode unless the score has train_mode. Raises CalibrationError.
    """
    if score.reads.calibrated and (batches is None or loss is None):
        raise CalibrationError(f"The score '{score.name}' reads {_WANTS[score.reads]}.")
    with ExitStack() as stack:
        stack.enter_context(still(model, tensors, bool(score.parameters.get("train_mode", False))))
        if score.drawn:
            stack.enter_context(drawn(tensors, score.drawn, seed))
        if not score.reads.calibrated:  # reads weights or nothing; some weights are drawn
            generator = torch.Generator().manual_seed(seed)
            return [score(_weight(t).reshape(-1), None, generator).reshape(t.form.shape) for t in tensors]
        reading = _Reading(score, tensors, batches, loss)
        if score.reads is Reads.FLOW:
            stack.enter_context(absolute(model))
        sums = reading.curvature(model) if score.reads is Reads.CURVATURE else reading.gradients(model)
    reading.check(sums)
    return sums


def again(first: list[Tensor], *how: Any) -> Callable[[], list[Tensor]]:
    """A function that gives the known scores at its first call, and calibrates at every later one."""
    known = [first]
    return lambda: known.pop() if known else calibrate(*how)


def check_rereadable(score: Score, batches: Batches | None) -> None:
    """Raises CalibrationError for data that can be read only once, if the schedule scores again during the run."""
    if batches is not None and not callable(batches) and iter(batches) is batches:
        raise CalibrationError(
            f"The score '{score.name}' is read again at every selection, and calibration= is a "
            f"{type(batches).__name__}, which is used up after the first. Give a list, or a callable that "
            "gives a new iterable."
        )


class _Reading:
    """One pass over the calibration data for one score."""

    def __init__(self, score: Score, tensors: Sequence[ScopedTensor], batches: Any, loss: Any) -> None:
        self.score, self.tensors, self.batches, self.loss = score, tensors, batches, loss
        self.unit = "examples" if score.reads is Reads.EXAMPLES else "batches"
        self.wanted = int(score.parameters.get(self.unit) or 0) or None
        self.labels = str(score.parameters.get("labels", "data"))
        self.clip = float(score.parameters.get("clip") or 0)
        self.temperature = float(score.parameters.get("temperature", 1.0))
        self.seen = 0
        self._weight_of_class = 1.0

    # -- scores of one gradient at a time

    def gradients(self, model: nn.Module) -> list[Tensor]:
        """Sums of the score. Each tensor's gradient is added as it appears, and then dropped."""
        sums = [torch.zeros(t.parameter.shape, dtype=_wide(t), device=t.parameter.device) for t in self.tensors]
        with self._folding(sums):
            for batch in self._chosen(model):
                for part, weight in self._losses(self._loss_of(model, batch)):
                    self._weight_of_class = weight
                    part.backward(retain_graph=True)
        if self.score.reads is Reads.POOLED:
            return [self._score(t, total) for t, total in zip(self.tensors, sums, strict=True)]
        return sums

    @contextmanager
    def _folding(self, sums: Sequence[Tensor]) -> Iterator[None]:
        handles = [t.parameter.register_post_accumulate_grad_hook(self._fold(t, sums[t.index])) for t in self.tensors]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _fold(self, tensor: ScopedTensor, total: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            gradient = (gradient.to_dense() if gradient.is_sparse else gradient).to(total.dtype)
            if self.clip:
                gradient = gradient * (self.clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
            if self.score.reads is not Reads.POOLED:
                gradient = self._score(tensor, gradient)
            total.add_(gradient, alpha=self._weight_of_class)

        return hook

    # -- the Hessian-gradient product

    def curvature(self, model: nn.Module) -> list[Tensor]:
        """f(w, H g) in two rounds over the batches: the first sums g, the second the gradients of <g_b, g> to H g."""
        weights = [t.parameter for t in self.tensors]
        totals = [
            torch.zeros(w.shape, dtype=_wide(t), device=w.device) for t, w in zip(self.tensors, weights, strict=True)
        ]
        products = [torch.zeros_like(total) for total in totals]
        kept = list(self._batches())
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
            for batch in kept:
                for total, gradient in zip(totals, self._gradients(model, batch, weights), strict=True):
                    if gradient is not None:
                        total.add_(gradient)
            for batch in kept:
                gradients = self._gradients(model, batch, weights, graph=True)
                pairs = [(g, v) for g, v in zip(gradients, totals, strict=True) if g is not None and g.requires_grad]
                if not pairs:
                    continue  # the loss is linear in the weights: no curvature
                along = torch.stack([(g.to(v) * v).sum() for g, v in pairs]).sum()
                for product, part in zip(products, torch.autograd.grad(along, weights, allow_unused=True), strict=True):
                    if part is not None:
                        product.add_(part)
        return [self._score(t, product) for t, product in zip(self.tensors, products, strict=True)]

    def _gradients(self, model: nn.Module, batch: Any, weights: list[nn.Parameter], graph: bool = False) -> list[Any]:
        ((loss, _),) = self._losses(self._loss_of(model, batch))
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, create_graph=graph)
        return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]

    # -- batches and losses

    def _batches(self) -> Iterator[Any]:
        self.seen = 0
        for batch in itertools.islice(opened(self.batches), self.wanted):
            self.seen += 1
            yield batch

    def _chosen(self, model: nn.Module) -> Iterable[Any]:
        """All batches; for a score with `hardest`, only those with the largest loss at the present weights."""
        hardest = self.score.parameters.get("hardest")
        if hardest is None:
            return self._batches()
        if self.labels != "data":
            raise CalibrationError('hardest= goes by the loss of each example: use labels="data".')
        kept = list(self._batches())
        with torch.no_grad():
            losses = [float(self._losses(self._loss_of(model, batch))[0][0]) for batch in kept]
        losses = [value if value == value else float("-inf") for value in losses]  # NaN comes last
        order = sorted(range(len(kept)), key=lambda i: (-losses[i], i))
        return [kept[i] for i in sorted(order[: int(hardest)])]

    def _score(self, tensor: ScopedTensor, gradient: Tensor) -> Tensor:
        weight = tensor.weight.to(gradient.dtype)
        return self.score(weight.reshape(-1), gradient.reshape(-1)).reshape(weight.shape)

    def _loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        if self.temperature == 1.0:
            return self.loss(model, batch)
        try:
            return self.loss(model, batch, temperature=self.temperature)
        except TypeError as error:
            if "temperature" not in str(error):
                raise
            raise CalibrationError(
                f"The score '{self.score.name}' divides logits by its temperature {self.temperature:g}, which only "
                "the loss callable can do. Give one that takes (model, batch, temperature), or set temperature=1."
            ) from error

    def _losses(self, result: Tensor) -> list[tuple[Tensor, float]]:
        """The scalars that backward runs from, and the weight of each in the sum."""
        if self.labels == "data":
            if result.numel() != 1:
                what = "the loss" if self.score.reads is not Reads.FLOW else "the sum of the outputs"
                raise CalibrationError(f'With labels="data" {what} must be a scalar, got shape {tuple(result.shape)}.')
            return [(result.reshape(()), 1.0)]
        if result.ndim != 2 or result.shape[0] != 1 or result.shape[1] < 2:
            raise CalibrationError(
                'With labels="model" the callable must return logits of one example over at least two classes, shape '
                f'(1, classes), got {tuple(result.shape)}. A regression has no classes: use labels="data".'
            )
        log_p = torch.log_softmax(result[0], 0)
        return [(-log_p[c], float(log_p[c].detach().exp())) for c in range(result.shape[1])]

    def check(self, sums: Sequence[Tensor]) -> None:
        """Raises CalibrationError for too little data, for scores that are not finite, and if all scores are 0."""
        if self.seen == 0:
            raise CalibrationError("calibration= yielded no batch; the score needs at least one example.")
        if self.wanted is not None and self.seen < self.wanted:
            raise CalibrationError(
                f"calibration= yielded {self.seen} of the {self.wanted} {self.unit} asked for. Give more, or lower "
                f"{self.unit}=."
            )
        hardest = self.score.parameters.get("hardest")
        if hardest is not None and self.seen < hardest:
            raise CalibrationError(f"calibration= yielded {self.seen} examples; the {hardest} hardest were asked for.")
        broken = [t.name for t, s in zip(self.tensors, sums, strict=True) if not bool(torch.isfinite(s).all())]
        if broken:
            raise CalibrationError(
                f'Scores of {len(broken)} tensors are NaN or infinite, first of "{broken[0]}", so no selection can '
                f"be made: the loss or its gradient left the range of {next(t.parameter.dtype for t in self.tensors)}."
            )
        if not any(bool(s.any()) for s in sums):
            raise CalibrationError(
                f"No example sent a gradient into the {len(self.tensors)} tensors in scope, or every score is 0. Does "
                "the loss depend on the model, and are some weights in scope not 0?"
            )


def opened(batches: Batches) -> Iterator[Any]:
    """A new iterator over the calibration data, an iterable or a callable that gives one."""
    return iter(batches() if callable(batches) else batches)


def _weight(tensor: ScopedTensor) -> Tensor:
    return tensor.weight.to(_wide(tensor))


def _wide(tensor: ScopedTensor) -> torch.dtype:
    return bits.wide(tensor.form.dtype)
