"""Dense phases: what is trained while every entry in scope is. A value with the members of `types.DensePhase`.

`Weights` trains the weights themselves, `Gates` a difference to the base behind gates that can close.
Letters: theta_0 the weight before the phase, N entries in scope.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selectune.errors import ConfigError
from selectune.types import Here


@dataclass(frozen=True)
class Weights:
    """The weights themselves are trained, in place where they are float32 or float64, else behind master values.

    `l1`: adds the gradient of l1 * sum |theta - theta_0| / N, which keeps changes few. `p` below 1: at every
    step each entry of the gradient is kept with this probability and divided by it, so the mean is the
    gradient. `lr`: the phase's own learning rate; None: that of the optimizer.

    >>> import torch
    >>> from selectune.types import Here
    >>> here = Here(torch.zeros(3), (torch.tensor([2.0, 0.0, -1.0]),), torch.Generator(), total=3)
    >>> Weights(l1=0.3).step((torch.ones(3),), here)[0].tolist()
    [1.100000023841858, 1.0, 0.8999999761581421]
    """

    l1: float = 0.0
    p: float = 1.0
    lr: float | None = None

    itself = True
    found = False

    def __post_init__(self) -> None:
        _at_least_0("l1", self.l1)
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 < self.p <= 1:
            raise ConfigError(f"p={self.p!r}: the probability that a gradient is kept, above 0 and at most 1.")
        _rate("lr", self.lr)

    @property
    def latents(self) -> Mapping[str, float | None]:
        return {"weight": self.lr}

    def start(self, base: Tensor) -> tuple[Tensor, ...]:
        return (base.clone(),)

    def weight(self, here: Here) -> Tensor:
        return here.latents[0]

    def pull(self, gradient: Tensor, here: Here) -> tuple[Tensor, ...]:
        return (gradient,)

    def step(self, gradients: tuple[Tensor, ...], here: Here) -> tuple[Tensor, ...]:
        (gradient,) = gradients
        if self.l1:
            gradient = gradient + (here.latents[0] - here.base).sign_().mul_(self.l1 / here.total)
        if self.p < 1:
            kept = uniform(gradient, here.generator) < self.p
            gradient = torch.where(kept, gradient / self.p, 0.0)
        return (gradient,)

    def change(self, here: Here) -> Tensor:
        return here.latents[0] - here.base


@dataclass(frozen=True)
class Gates:
    """theta = theta_0 + z w: a dense difference w behind hard-concrete gates z in [0, 1], both trained.

    s = sigmoid(log u - log(1 - u) + alpha), u uniform in [1e-4, 1 - 1e-4]; z = min(1, max(0, s (right - left) + left)).
    Gradients, g that of the weight: dL/dw = g z and dL/dalpha = g w dz/dalpha, where dz/dalpha is
    (right - left) s (1 - s) while 0 < z < 1, else 0. One z is drawn a step, whatever the number of its backward passes.

    `penalty`: the gradient of penalty * sum P(z != 0), P = sigmoid(alpha - log(-left / right)), is added to that of
    alpha, after clipping and unscaling. `structured`: every tensor has one more gate, and z is the product of both;
    the sum is then over P P_tensor ("product"), or over P once an entry and P_tensor once a tensor ("sum").
    `start_from="found"`: selected entries go on from theta_0 + z w, else from theta_0. The change is z w with u = 1/2.
    Costs two floats an entry beside the weight, and what the optimizer keeps of each.

    Source: Guo, Rush, Kim (2021), Diff Pruning, arXiv 2012.07463; the gates: Louizos, Welling, Kingma
    (2018), L0 regularization, arXiv 1712.01312.

    >>> import torch
    >>> from selectune.types import Here
    >>> s, z, slope = Gates().gate(torch.tensor([0.0]), torch.tensor([0.6]))
    >>> [round(v.item(), 4) for v in (s, z, slope)]
    [0.6, 0.3, 0.72]
    """

    penalty: float = 1.25e-7
    structured: bool = True
    group_penalty: str = "product"
    start_from: str = "base"
    alpha: float = 5.0
    left: float = -1.5
    right: float = 1.5
    lr: float | None = None
    gate_lr: float | None = 0.1

    itself = False

    def __post_init__(self) -> None:
        _at_least_0("penalty", self.penalty)
        for name, value, known in (
            ("group_penalty", self.group_penalty, ("product", "sum")),
            ("start_from", self.start_from, ("base", "found")),
        ):
            if value not in known:
                raise ConfigError(f"Unknown {name} '{value}'. Known: {', '.join(known)}.")
        if not isinstance(self.structured, bool):
            raise ConfigError(f"structured={self.structured!r}: True or False is needed.")
        if not (math.isfinite(self.alpha) and -math.inf < self.left < 0 and 1 < self.right < math.inf):
            raise ConfigError(
                f"Gates need a finite alpha, left below 0 and right above 1, got alpha={self.alpha}, left={self.left}, "
                f"right={self.right}: only then can a gate be fully closed and fully open."
            )
        _rate("lr", self.lr)
        _rate("gate_lr", self.gate_lr)

    @property
    def found(self) -> bool:
        return self.start_from == "found"

    @property
    def latents(self) -> Mapping[str, float | None]:
        gates = {"gate": self.gate_lr, "group": self.gate_lr} if self.structured else {"gate": self.gate_lr}
        return {"difference": self.lr, **gates}

    def start(self, base: Tensor) -> tuple[Tensor, ...]:
        zero, gate = torch.zeros_like(base), torch.full_like(base, self.alpha)
        return (zero, gate, base.new_full((), self.alpha)) if self.structured else (zero, gate)

    def weight(self, here: Here) -> Tensor:
        z, _, group = self._drawn(here)
        z = z if group is None else z.mul_(group[0])
        return torch.addcmul(here.base, z, here.latents[0])

    def pull(self, gradient: Tensor, here: Here) -> tuple[Tensor, ...]:
        w = here.latents[0]
        z, slope, group = self._drawn(here)
        if group is None:
            return gradient * z, gradient * w * slope
        whole, whole_slope = group
        per_gate = gradient * w
        return gradient * (z * whole), per_gate * (whole * slope), (per_gate * z).sum() * whole_slope

    def step(self, gradients: tuple[Tensor, ...], here: Here) -> tuple[Tensor, ...]:
        if not self.penalty:
            return gradients
        shift = math.log(-self.left / self.right)
        p = torch.sigmoid(here.latents[1] - shift)
        slope = self.penalty * p * (1 - p)
        if not self.structured:
            return gradients[0], gradients[1] + slope
        whole = torch.sigmoid(here.latents[2] - shift)
        whole_slope = self.penalty * whole * (1 - whole)
        if self.group_penalty == "product":
            slope, whole_slope = slope * whole, whole_slope * p.sum()
        return gradients[0], gradients[1] + slope, gradients[2] + whole_slope

    def change(self, here: Here) -> Tensor:
        z = self.gate(here.latents[1], None)[1]
        if self.structured:
            z = z * self.gate(here.latents[2], None)[1]
        return z * here.latents[0]

    def gate(self, alpha: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """s, z and dz/dalpha of gates with this draw; without one u = 1/2, the gate's median."""
        width = self.right - self.left
        s = torch.sigmoid(alpha) if u is None else torch.logit(u, eps=1e-4).add_(alpha).sigmoid_()
        z = (s * width).add_(self.left)
        slope = torch.addcmul(s, s, s, value=-1).mul_(width).masked_fill_((z <= 0) | (z >= 1), 0.0)
        return s, z.clamp_(0.0, 1.0), slope

    def _drawn(self, here: Here) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """z and its slope of every entry, and those of the tensor's own gate; the tensor's is drawn first."""
        whole = None
        if self.structured:
            alpha = here.latents[2]
            _, *whole = self.gate(alpha, uniform(alpha, here.generator))
        alpha = here.latents[1]
        _, z, slope = self.gate(alpha, uniform(alpha, here.generator))
        return z, slope, None if whole is None else (whole[0], whole[1])


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers uniform in [0, 1), in row-major order whatever the tensor's strides."""
    return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _at_least_0(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name}={value!r}: a finite number of at least 0 is needed.")


def _rate(name: str, value: float | None) -> None:
    fine = value is None or (not isinstance(value, bool) and isinstance(value, int | float))
    if not fine or (value is not None and not (math.isfinite(value) and value > 0)):
        raise ConfigError(f"{name}={value!r}: a learning rate above 0 is needed, or None for the optimizer's own.")
