"""The dense phase of a run: its latents, their gradients, the weights that follow, and the way back to sparse steps.

While the phase is on, autograd gives every weight in scope its ordinary dense gradient, and the taps are asleep.
Latents other than the weight itself are parameters on the model, hidden from its state dict; a hook turns a weight's
gradient into theirs as it appears. When the phase ends, the weights are the base again, bit for bit, the best entries
get slots, and all memory beyond O(B) is freed.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selectune import bits, internals, ops
from selectune.errors import ConfigError, IntegrityError, NonFiniteError, OptimizerError, some
from selectune.ops.scratch import scratch
from selectune.phases import DensePhase, Here
from selectune.scope import OWN, Found
from selectune.seeds import Stream, mixed
from selectune.train.choose.chooser import Chooser
from selectune.train.choose.scan import scan
from selectune.train.support.proof import BaseCopy
from selectune.types import Phased

log = logging.getLogger("selectune")

WIDE = (torch.float32, torch.float64)


class DenseThenSparse(Chooser):
    """Turns a dense phase on and off, follows its steps, and selects when it ends."""

    def __init__(self, *run: Any, kind: DensePhase, found: Found, base: BaseCopy, carrier: nn.Module) -> None:
        super().__init__(*run)
        self.kind, self.phased = kind, self.schedule if isinstance(self.schedule, Phased) else None
        self.reached: set[int] = set()  # tensors that ever sent a gradient in the phase
        self._carrier, self._base, self._heads, self._total = carrier, base, found.whole, found.eligible
        self._before: list[Tensor] = []  # the heads as the phase began
        self._hooks: list[RemovableHandle] = []
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._pulled = False  # whether a gradient came since the last step
        self._written: list[int] = []  # versions of the latents when the weights were written
        self.latents = [self._make(t.parameter) for t in self.tensors]

    def _make(self, weight: nn.Parameter) -> list[nn.Parameter]:
        if self.kind.itself and weight.dtype in WIDE:
            return [weight]
        return [
            nn.Parameter(torch.empty(0, dtype=bits.wide(weight.dtype), device=weight.device)) for _ in self.kind.latents
        ]

    # -- what is trained

    def parameters(self) -> list[nn.Parameter]:
        """The latents while the phase is on, tensor by tensor."""
        return [latent for latents in self.latents for latent in latents] if self.dense else []

    def rates(self) -> dict[int, float]:
        """{id of a latent: its own learning rate}, of latents that have one."""
        own = list(self.kind.latents.values())
        rates = [(latent, rate) for latents in self.latents for latent, rate in zip(latents, own, strict=True)]
        return {id(latent): rate for latent, rate in rates if rate is not None}

    def bytes(self) -> int:
        """Bytes beside the model while the phase is on: base, latents, gradients, and AdamW's two moments of each.

        Also the copies of the heads, and memory of the largest tensor's size that all tensors use in turn.
        """
        total = sum(t.nbytes for t in self._before)
        total += self._largest(lambda index, weight: any(p.shape != weight.shape for p in self.latents[index]))
        total += self._largest(self._works_on_a_base)
        for tensor, latents in zip(self.tensors, self.latents, strict=True):
            weight = tensor.parameter
            own = len(latents) == 1 and latents[0] is weight
            trained = sum(latent.nbytes for latent in latents)
            total += weight.nbytes + trained * (3 if own else 4)
        return total

    def _largest(self, which: Callable[[int, nn.Parameter], bool]) -> int:
        """Bytes of memory that these tensors use in turn."""
        weights = [t.parameter for t in self.tensors if which(t.index, t.parameter)]
        return max((w.numel() * bits.wide(w.dtype).itemsize for w in weights), default=0)

    def _works_on_a_base(self, index: int, weight: nn.Parameter) -> bool:
        """Whether the phase's base differs from the kept copy: it is widened, or has the values of earlier rounds."""
        return weight.dtype not in WIDE or self.ledger.pages[index].flat.numel() > 0

    # -- on and off

    @torch.no_grad()
    def begin(self) -> None:
        """Turns the phase on: every entry in scope is trained."""
        self.dense, self._pulled = True, False
        self.ledger.offsets.grad = None
        self._base.hold(self.tensors, self.ledger)
        self._before = [] if self.kind.found else [t.weight.clone() for t in self._heads]
        for index, (tensor, latents) in enumerate(zip(self.tensors, self.latents, strict=True)):
            tensor.parameter.requires_grad_(True)
            if latents[0] is not tensor.parameter:
                begun = self.kind.start(_widened(tensor.weight))
                for name, latent, start in zip(self.kind.latents, latents, begun, strict=True):
                    latent.data = start
                    self._carrier.register_parameter(f"{OWN}{name}_{index}", latent)
            hook = functools.partial(self._pull, index)
            self._hooks.append(tensor.parameter.register_post_accumulate_grad_hook(hook))
        self.write_weights()

    @torch.no_grad()
    def end(self) -> None:
        """Rewinds the weights, gives the best entries slots, and frees everything dense.

        Raises NonFiniteError, with nothing changed, if the phase ended in NaN or infinity.
        """
        ledger, step = self.ledger, self.clock.step
        broken = [
            t.name for t in self.tensors if not bool(torch.isfinite(self.kind.change(self._input(t.index))).all())
        ]
        if broken:
            raise NonFiniteError(
                f"The dense phase ended at step {step} with NaN or infinity in {len(broken)} tensors "
                f"({some(broken)}), so its changes cannot be ranked. Lower its learning rate."
            )
        quota = 0 if self.phased is None else self.phased.target(step) - ledger.selected
        collector = self.method.select.collector(quota, self.sizes, self.seed)
        for tensor in self.tensors:
            change = self.kind.change(self._input(tensor.index))
            tensor.parameter.copy_(self._base.whole[tensor.name])
            if self.method.score is not None and quota > 0:
                scan(collector, self.score, tensor, ledger.pages[tensor.index].flat, change)
        tensors, flat, changes = collector.close()
        if flat.numel() < quota:
            self.events["shortfall"] += quota - flat.numel()
        slots = ledger.add(tensors, flat)
        if self.kind.found:
            ledger.offsets[slots] = changes.to(ledger.offsets)
        ledger.write_weights()
        self._rewind_heads()
        self._restart(ledger.offsets)
        self.free()

    def free(self) -> None:
        """Turns the phase off and frees its memory; the weights are left as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for index, (tensor, latents) in enumerate(zip(self.tensors, self.latents, strict=True)):
            tensor.parameter.requires_grad_(False)
            tensor.parameter.grad = None
            for name, latent in zip(self.kind.latents, latents, strict=True):
                latent.grad = None
                for optimizer in self._optimizers:
                    internals.forget(optimizer, latent)
                if latent is not tensor.parameter:
                    latent.data = latent.data.new_empty(0)
                    self._carrier._parameters.pop(f"{OWN}{name}_{index}", None)
        self._base.release(self.tensors)
        self._before.clear()
        ops.release()
        self.dense = False

    def leave(self) -> None:
        if self.dense:
            self.free()

    def _rewind_heads(self) -> None:
        if self.kind.found:
            return
        for tensor, before in zip(self._heads, self._before, strict=True):
            tensor.parameter.copy_(before)
            self._restart(tensor.parameter)

    def _restart(self, parameter: nn.Parameter) -> None:
        """Drops the optimizer state of a tensor that continues from an older value."""
        parameter.grad = None
        for optimizer in self._optimizers:
            internals.forget(optimizer, parameter)

    # -- forward and backward

    def refresh(self) -> None:
        if self._versions() == self._written:
            return
        if self._pulled and not self.clock.in_step:
            raise OptimizerError(
                "The tensors of the dense phase changed without a step of a torch.optim.Optimizer, whose hooks tell "
                "when the phase is over. Use a subclass of torch.optim.Optimizer."
            )
        self.write_weights()

    @torch.no_grad()
    def write_weights(self) -> None:
        for tensor, latents in zip(self.tensors, self.latents, strict=True):
            weight = tensor.weight
            if latents[0] is tensor.parameter:
                continue
            value = self.kind.weight(self._input(tensor.index, weight if weight.dtype in WIDE else None))
            if value is not weight:
                weight.copy_(value)
        self._written = self._versions()

    @torch.no_grad()
    def _pull(self, index: int, weight: Tensor) -> None:
        """A weight's gradient is complete: turns it into the latents' gradients."""
        self._pulled = True
        self.reached.add(index)
        latents, gradient = self.latents[index], weight.grad
        if gradient is None:
            return
        if gradient.is_sparse:
            gradient = weight.grad = gradient.to_dense()
        if latents[0] is not weight:
            weight.grad = None
            for latent, part in zip(latents, self.kind.pull(_widened(gradient), self._input(index)), strict=True):
                latent.grad = _laid_out(part, latent) if latent.grad is None else latent.grad.add_(part)
        if self.clock.in_step:
            self._finish(index, lambda latent: True)  # in a closure: the optimizer's pre-step hook has run already

    def _versions(self) -> list[int]:
        return [latent._version for latents in self.latents for latent in latents]

    def _input(self, index: int, target: Tensor | None = None) -> Here:
        """The input of the phase's functions; valid until the next one, which may use the same memory for its base."""
        tensor, ledger = self.tensors[index], self.ledger
        base, page = self._base.held(tensor), ledger.pages[index]
        if self._works_on_a_base(index, tensor.parameter):
            base = _lend(base, "base").copy_(base)
        if page.flat.numel():  # a later round: selected entries began it with their values
            values = ledger.values()[page.slot].to(base.device, tensor.parameter.dtype)
            ops.scatter_entries(base, page.flat, values)
        stream = Stream(mixed(self.seed, self.clock.step, index))
        latents = tuple(latent.detach() for latent in self.latents[index])
        return Here(base, latents, stream, self._total, target, True, _lend, ops.uniform)

    # -- the optimizer's step

    def last_word(self, optimizer: torch.optim.Optimizer, held: set[int], frozen: set[int]) -> bool:
        """Applies penalties and masks as an optimizer is about to step; returns whether it trains part of the phase."""
        mine = {id(p) for p in self.parameters()}
        if not held & mine:
            if held & (frozen | {id(self.ledger.offsets)}):
                raise OptimizerError(
                    f"A dense phase is on, and this {type(optimizer).__name__} holds nothing that the dense phase "
                    "trains. Make the optimizer right after attach, over tuner.parameters(): then it serves all phases."
                )
            return False
        if self._leads(held) and self.phased is not None and id(self.ledger.offsets) not in held:
            raise OptimizerError(
                f"This {type(optimizer).__name__} holds the tensors of the dense phase and not the tuner's offsets, so "
                "nothing would be trained once the phase is over. Make it after attach, over tuner.parameters()."
            )
        self._optimizers.add(optimizer)
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales inside its step
        for index in range(len(self.tensors)):
            self._finish(index, lambda latent: id(latent) in held, scale)
        return True

    @torch.no_grad()
    def _finish(self, index: int, holds: Callable[[nn.Parameter], bool], scale: Tensor | None = None) -> None:
        latents = self.latents[index]
        gradients = tuple(latent.grad for latent in latents if latent.grad is not None)
        if len(gradients) < len(latents):
            return  # the step does not use this tensor
        if scale is not None:
            gradients = tuple(g / scale for g in gradients)
        else:  # another optimizer's latents get theirs at its own step
            gradients = tuple(g if holds(latent) else g.clone() for g, latent in zip(gradients, latents, strict=True))
        for latent, gradient in zip(latents, self.kind.step(gradients, self._input(index)), strict=True):
            if holds(latent):
                latent.grad = _laid_out(gradient if scale is None else gradient * scale, latent)

    def counts(self, held: set[int]) -> bool:
        """Whether an optimizer's step counts as one of the run: it holds the first latent, and gradients came."""
        if not self._leads(held) or not self._pulled:
            return False
        self._pulled = False
        return True

    def switch_phase(self) -> bool:
        due = self.phased is None or self.phased.dense(self.clock.step)
        if due == self.dense:
            return False
        self.begin() if due else self.end()
        return True

    def weights_changed(self) -> None:
        """Sets the latents to the loaded weights if they can be computed from them."""
        for tensor, latents in zip(self.tensors, self.latents, strict=True):
            weight, latent = tensor.weight, latents[0].detach()
            if latents[0] is tensor.parameter:
                continue
            expected = self.kind.weight(self._input(tensor.index)).to(weight)
            same = ops.bits(expected) == ops.bits(weight)
            if self.kind.itself:
                latent.copy_(torch.where(same.view_as(latent), latent, weight.to(latent)))
            elif not bool(same.all()):
                raise IntegrityError(
                    f'load_state_dict changed "{tensor.name}" in a dense phase whose weights follow from other '
                    "tensors, which a state dict does not hold. Detach first, or load before attach."
                )
        self._written = self._versions()

    def _leads(self, held: set[int]) -> bool:
        return id(self.latents[0][0]) in held

    # -- resuming a run

    def phase(self) -> dict[str, Any]:
        """What a later process needs of the phase, beside step and ledger; as large as the model while it is on."""
        latents = [[p.detach().clone() for p in latents] for latents in self.latents] if self.dense else []
        return {"on": self.dense, "latents": latents, "before": [t.clone() for t in self._before]}

    @torch.no_grad()
    def load_phase(self, state: Mapping[str, Any]) -> None:
        """Takes what `phase` gave, after step and ledger; optimizers made before still hold the phase's tensors."""
        self._pulled = False
        if not state["on"]:
            if self.dense:
                for tensor in self.tensors:
                    tensor.parameter.copy_(self._base.whole[tensor.name])
                self.free()
            return
        if not self.dense:
            self.begin()
        saved = [latent for latents in state["latents"] for latent in latents]
        if [tuple(t.shape) for t in saved] != [tuple(p.shape) for p in self.parameters()]:
            raise ConfigError(
                "The saved dense phase is that of another model or method: its tensors have other shapes."
            )
        for latent, value in zip(self.parameters(), saved, strict=True):
            latent.copy_(value)
        for before, value in zip(self._before, state["before"], strict=True):
            before.copy_(value)
        self.write_weights()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(bits.wide(tensor.dtype))


def _lend(like: Tensor, purpose: str = "lent") -> Tensor:
    """Memory of a tensor's shape and strides in a wide dtype; on the CPU all tensors get the same."""
    dtype = bits.wide(like.dtype)
    if like.device.type == "cpu" and like.is_contiguous():
        return scratch(f"dense {purpose}", like.shape, dtype)
    return torch.empty_like(like, dtype=dtype)


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient in the memory layout of its tensor, which fused optimizers require."""
    return gradient if gradient.stride() == like.stride() else torch.empty_like(like).copy_(gradient)
