"""AdaMix: several bottlenecks at each site, one drawn at random in training, their mean outside of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectune.adapters.injected import Injected, Wanted, put_children
from selectune.adapters.own.bottleneck import ACTIVATIONS, Bottleneck
from selectune.adapters.roles import of_kind, width
from selectune.errors import ConfigError

NAME = "mixture"
IGNORED = -100  # the label of tokens without a loss


class Mixture(nn.Module):
    """U_j f(D_i h + b_i) + c_j; in training i and j are drawn for each forward pass, else D, b, U and c are means.

    The draw is torch's, as that of dropout is, so that checkpointed activations are computed again along the same way.
    """

    def __init__(self, d: int, r: int, experts: int, activation: str, init: str) -> None:
        super().__init__()
        made = [Bottleneck(d, r, activation, init) for _ in range(experts)]
        self.down, self.up = nn.ModuleList(one.down for one in made), nn.ModuleList(one.up for one in made)
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:  # (..., d) -> (..., d)
        (d, b), (u, c) = self._chosen(self.down), self._chosen(self.up)
        return F.linear(ACTIVATIONS[self.activation](F.linear(h.to(d.dtype), d, b)), u, c).to(h.dtype)

    def _chosen(self, layers: nn.ModuleList) -> tuple[Tensor, Tensor]:
        if not self.training:
            return averaged(layers)
        layer = cast(nn.Linear, layers[int(torch.randint(len(layers), ()))])
        return layer.weight, layer.bias


def averaged(layers: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """The mean weight and the mean bias of linear layers.

    Source: Wang et al. (2022), AdaMix, arXiv 2205.12410.

    >>> one, three = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> for layer, value in ((one, 1.0), (three, 3.0)):
    ...     _ = nn.init.constant_(layer.weight, value)
    >>> averaged(nn.ModuleList([one, three]))[0].item()
    2.0
    """
    found = [cast(nn.Linear, layer) for layer in layers]
    return torch.stack([layer.weight for layer in found]).mean(0), torch.stack([layer.bias for layer in found]).mean(0)


def consistency(first: Tensor, second: Tensor) -> Tensor:
    """(KL(p1 || p2) + KL(p2 || p1)) / 2 in nats of two logits (..., classes), the mean over the rows.

    The gradient goes into both; the authors' code holds the one on the right of each KL fixed.
    Source: Wang et al. (2022), AdaMix, arXiv 2205.12410.

    >>> p1, p2 = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> round(consistency(p1.log(), p2.log()).item(), 4)
    0.4394
    """
    p1, p2 = first.float().log_softmax(-1), second.float().log_softmax(-1)
    return ((p1.exp() - p2.exp()) * (p1 - p2)).sum(-1).mean() / 2


def put_on(wanted: Wanted) -> Injected:
    """Puts a mixture at the end of every FFN, and runs the model twice for each forward pass in training.

    The loss of the first pass gets `consistency` of both outputs added, times `weight`; where the outputs are no
    classes (one number, or labels that do not exclude each other), their mean squared difference.
    """
    model, o = wanted.model, wanted.options
    layers = {role.name: model.get_submodule(role.name) for role in of_kind(wanted.found, "ffn2")}
    if not layers:
        raise ConfigError(f"The role map of {type(model).__name__} names no place for adamix: it needs ffn2.")
    children: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, layer in layers.items():
        d = width(layer)
        made = Mixture(d, max(1, d // o["reduction"]), o["experts"], o["activation"], o["init"])
        children[name] = made, cast(Tensor, layer.weight)
    twice = model.register_forward_hook(partial(_twice, o["weight"]), with_kwargs=True)
    hook = lambda path, module, child: [module.register_forward_hook(_mixed)]  # noqa: E731
    return Injected(model, put_children(model, NAME, children, hook, [twice]))


def _mixed(module: Any, args: Any, output: Tensor) -> Tensor:
    del args
    return output + module.mixture(output)


def _twice(weight: float, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
    if not (module.training and torch.is_grad_enabled() and isinstance(getattr(output, "loss", None), Tensor)):
        return
    first, second = output.logits, module.forward(*args, **kwargs).logits
    labels = kwargs.get("labels")
    if labels is not None and first.dim() == 3:  # tokens: those that have a loss
        if type(module).__name__.endswith("ForCausalLM"):
            first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
        first, second = first[labels != IGNORED], second[labels != IGNORED]
    exclusive = first.shape[-1] > 1 and getattr(module.config, "problem_type", None) != "multi_label_classification"
    term = consistency(first, second) if exclusive else F.mse_loss(first.float(), second.float())
    output.loss = output.loss + weight * term
