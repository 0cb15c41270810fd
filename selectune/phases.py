"""Dense phases train every entry in scope for a while: the contract, `DensePhase`, and its values.

`Weights` trains the weights themselves. `Gates` trains a difference from the base behind gates that can close.
Letters: theta_0 the weight before the phase, N entries in scope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from selectune.errors import ConfigError
from selectune.seeds import Stream, uniform


@dataclass(frozen=True)
class Here:
    """One tensor at one step: the inputs of the dense-phase functions. The last four fields are buffers and helpers."""

    base: Tensor  # the weight before the phase; all tensors are float32, or float64 for float64 weights
    latents: tuple[Tensor, ...]
    stream: Stream  # of this run, step and tensor, so it draws the same whenever it is asked within a step
    total: int  # N, the entries in scope
    target: Tensor | None = None  # memory where `weight` may write its result
    in_place: bool = False  # `step` may write into its gradients
    lend: Callable[[Tensor], Tensor] | None = None  # undefined memory like a tensor's, until the next call
    draw: Callable[[Tensor, Stream, Tensor | None], Tensor] | None = None  # as `seeds.uniform`, but faster


@runtime_checkable
class DensePhase(Protocol):
    """What a dense phase trains, and how the weights follow.

    A weight is a function of *latents*, tensors that the user's optimizer trains in its place. In a step:

        forward   the weights are `weight(here)`
        backward  `pull` turns the weight's dense gradient into the latents'; the dense gradient is freed
        step      `step` changes the latents' gradients after clipping and unscaling

    At the end the score reads `change`, the weights get their old bits back, entries are selected, and the latents
    are freed with their gradients and optimizer state. All functions are pure, except for the buffers in `Here`.
    """

    @property
    def latents(self) -> Mapping[str, float | None]:
        """{name of a latent: its own learning rate}; None is the optimizer's rate."""
        ...

    @property
    def itself(self) -> bool:
        """True: the only latent is the weight itself, which is trained in place if its dtype allows."""
        ...

    @property
    def found(self) -> bool:
        """True: selected entries keep the values learned in the dense phase. False: they restart from the base."""
        ...

    def start(self, base: Tensor) -> tuple[Tensor, ...]:
        """The latents of a tensor at the phase's first step, when the weight is `base`."""
        ...

    def weight(self, here: Here) -> Tensor:
        """The weight in the next forward."""
        ...

    def pull(self, gradient: Tensor, here: Here) -> tuple[Tensor, ...]:
        """The latents' gradients from the weight's; linear, so that the passes of a step add up."""
        ...

    def step(self, gradients: tuple[Tensor, ...], here: Here) -> tuple[Tensor, ...]:
        """The gradients that the optimizer sees: with penalties added, or masked."""
        ...

    def change(self, here: Here) -> Tensor:
        """What the phase has added to `base`, without noise."""
        ...


@dataclass(frozen=True)
class Weights:
    """Trains the weights themselves, in place if they are float32 or float64, else behind float32 masters.

    `l1`: adds the gradient of l1 * sum |theta - theta_0| / N, which keeps changes few. `p` below 1: every
    step keeps each entry of the gradient with this probability and divides it by p, so the mean is the
    gradient. `lr`: the phase's own learning rate; None is the optimizer's.

    >>> import torch
    >>> from selectune.seeds import Stream
    >>> from selectune.phases import Here
    >>> here = Here(torch.zeros(3), (torch.tensor([2.0, 0.0, -1.0]),), Stream(0), total=3)
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
            raise ConfigError(f"p={self.p!r}: the probability that a gradient is kept must be above 0 and at most 1.")
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
        gradients = _own(gradients, here)
        for gradient, now, base, room in pieces(gradients[0], here.latents[0], here.base, rooms=1):
            if self.l1:
                gradient.add_(torch.sub(now, base, out=room).sign_().mul_(self.l1 / here.total))
            if self.p < 1:
                _within(gradient.div_(self.p), _drawn(room, here, room), -1.0, self.p, gradient)
        return gradients

    def change(self, here: Here) -> Tensor:
        return here.latents[0] - here.base


@dataclass(frozen=True)
class Gates:
    """theta = theta_0 + z w: a dense difference w behind hard-concrete gates z in [0, 1], both trained.

    s = sigmoid(log u - log(1 - u) + alpha), u uniform in [1e-4, 1 - 1e-4]; z = min(1, max(0, s (right - left) + left)).
    Gradients, g that of the weight: dL/dw = g z and dL/dalpha = g w dz/dalpha, where dz/dalpha is
    (right - left) s (1 - s) while 0 < z < 1, else 0. All backward passes of a step see the same z.

    `penalty`: the gradient of penalty * sum P(z != 0), P = sigmoid(alpha - log(-left / right)), is added to alpha's
    after clipping and unscaling. `structured`: every tensor has one more gate, and z is the product of both; the sum
    then runs over P P_tensor ("product"), or over P for every entry and P_tensor for every tensor ("sum").
    `start_from="found"`: selected entries continue from theta_0 + z w, else from theta_0. The change is z w at u = 1/2.
    Costs two floats per entry beside the weight, and the optimizer's state for each.

    Source: Guo, Rush, Kim (2021), Diff Pruning, arXiv 2012.07463; the gates: Louizos, Welling, Kingma
    (2018), L0 regularization, arXiv 1712.01312.

    >>> import torch
    >>> from selectune.phases import Here
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
        w, alpha = here.latents[:2]
        out = torch.empty_like(here.base) if here.target is None else here.target
        group = self._group(here)
        for part, base, difference, gate, u, z in pieces(out, here.base, w, alpha, rooms=2):
            self._opened(gate, _drawn(gate, here, u), u, z)[1].clamp_(0.0, 1.0)
            torch.addcmul(base, z if group is None else z.mul_(group[0]), difference, out=part)
        return out

    def pull(self, gradient: Tensor, here: Here) -> tuple[Tensor, ...]:
        w, alpha = here.latents[:2]
        group = self._group(here)
        differences, gates = torch.empty_like(w), torch.empty_like(alpha)
        summed = gates if group is None else _lent(alpha, here)
        cut = pieces(gradient, w, alpha, differences, gates, summed, rooms=3)
        for g, difference, gate, for_w, for_gate, for_group, s, z, slope in cut:
            s, z = self._opened(gate, _drawn(gate, here, s), s, z)
            self._slope(s, z, slope)
            z.clamp_(0.0, 1.0)
            torch.mul(g, difference, out=for_gate)
            if group is not None:
                torch.mul(for_gate, z, out=for_group)
                z.mul_(group[0])
                slope.mul_(group[0])
            torch.mul(g, z, out=for_w)
            for_gate.mul_(slope)
        return (differences, gates) if group is None else (differences, gates, summed.sum() * group[1])

    def step(self, gradients: tuple[Tensor, ...], here: Here) -> tuple[Tensor, ...]:
        if not self.penalty:
            return gradients
        gradients = _own(gradients, here)
        shift = math.log(-self.left / self.right)
        alpha = here.latents[1]
        product = self.structured and self.group_penalty == "product"
        whole = torch.sigmoid(here.latents[2] - shift) if self.structured else None
        chances = _lent(alpha, here) if product else alpha
        for gradient, gate, chance, slope, room in pieces(gradients[1], alpha, chances, rooms=2):
            p = torch.sub(gate, shift, out=chance if product else room).sigmoid_()
            torch.mul(p, self.penalty, out=slope).mul_(torch.sub(1, p, out=room))
            gradient.add_(slope.mul_(whole) if whole is not None and product else slope)
        if whole is not None:
            slope = self.penalty * whole * (1 - whole)
            gradients[2].add_(slope * chances.sum() if product else slope)
        return gradients

    def change(self, here: Here) -> Tensor:
        w, alpha = here.latents[:2]
        out = torch.empty_like(w)
        group = self.gate(here.latents[2], None)[1] if self.structured else None
        for part, difference, gate, s, z in pieces(out, w, alpha, rooms=2):
            self._opened(gate, None, s, z)[1].clamp_(0.0, 1.0)
            torch.mul(z if group is None else z.mul_(group), difference, out=part)
        return out

    def gate(self, alpha: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """s, z and dz/dalpha of gates for a draw u; without one u = 1/2, the gate's median."""
        s, z, slope = (torch.empty_like(alpha) for _ in range(3))
        s, z = self._opened(alpha, None if u is None else u.clone(), s, z)
        self._slope(s, z, slope)
        return s, z.clamp_(0.0, 1.0), slope

    def _opened(self, alpha: Tensor, u: Tensor | None, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Writes s, and z before it is cut to [0, 1], into these two; with a draw u, s is written into u."""
        if u is None:
            torch.sigmoid(alpha, out=s)
        else:
            s = torch.logit(u, eps=1e-4, out=u).add_(alpha).sigmoid_()
        return s, torch.mul(s, self.right - self.left, out=z).add_(self.left)

    def _slope(self, s: Tensor, z: Tensor, slope: Tensor) -> None:
        """Writes dz/dalpha for a z that is not cut yet."""
        torch.addcmul(s, s, s, value=-1, out=slope).mul_(self.right - self.left)
        _within(slope, z, 0.0, 1.0, slope)

    def _group(self, here: Here) -> tuple[Tensor, Tensor] | None:
        """z and slope of the tensor's own gate, drawn before the entries' gates; None without one."""
        if not self.structured:
            return None
        alpha = here.latents[2]
        return self.gate(alpha, _drawn(alpha, here))[1:]


PIECE = 1 << 16  # entries that a thread works on at once: a few buffers of them fit in its cache


def pieces(*tensors: Tensor, rooms: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tensors of one shape into flat pieces in row-major order; they stay whole if they are not contiguous.

    With each piece come `rooms` buffers like it, of undefined content. All pieces share their memory, because the
    system would have to clear the pages of a new buffer every time.
    """
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in tensors):
        yield (*tensors, *(torch.empty_like(tensors[0]) for _ in range(rooms)))
        return
    length = PIECE * torch.get_num_threads()
    memory = [tensors[0].new_empty(min(length, tensors[0].numel())) for _ in range(rooms)]
    for parts in zip(*(t.view(-1).split(length) for t in tensors), strict=True):
        yield (*parts, *(room[: parts[0].numel()] for room in memory))


def _drawn(like: Tensor, here: Here, room: Tensor | None = None) -> Tensor:
    """Uniform draws in the shape of `like`; the engine's faster draw may write them into `room`."""
    return uniform(like, here.stream) if here.draw is None else here.draw(like, here.stream, room)


def _within(value: Tensor, x: Tensor, low: float, high: float, out: Tensor) -> Tensor:
    """`value` where low < x < high, else 0. One pass without a mask is ten times as fast as torch.where."""
    return torch.ops.aten.hardtanh_backward.grad_input(value, x, low, high, grad_input=out)


def _own(gradients: tuple[Tensor, ...], here: Here) -> tuple[Tensor, ...]:
    return gradients if here.in_place else tuple(g.clone() for g in gradients)


def _lent(like: Tensor, here: Here) -> Tensor:
    return torch.empty_like(like) if here.lend is None else here.lend(like)


def _at_least_0(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name}={value!r}: a finite number of at least 0 is needed.")


def _rate(name: str, value: float | None) -> None:
    fine = value is None or (not isinstance(value, bool) and isinstance(value, int | float))
    if not fine or (value is not None and not (math.isfinite(value) and value > 0)):
        raise ConfigError(f"{name}={value!r}: a learning rate above 0 is needed, or None for the optimizer's own.")
