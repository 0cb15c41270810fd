"""PASTA: a vector of each layer is added to each special token, before the layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectune.adapters.injected import Injected, Wanted, put_children
from selectune.adapters.roles import of_kind, width
from selectune.errors import ConfigError

NAME = "pasta"
AUTO = "auto"
PAIR = 3  # special tokens around two texts, of a BERT


class Pasta(nn.Module):
    """One layer's vectors, (count, d): number p is added to the hidden state of a row's p-th special token.

    `where`: for each token the number of its vector, or `count` for none; the model's embedding sets it.
    """

    def __init__(self, count: int, d: int, init: str, where: Specials) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(count, d))
        self.where = where
        if init == "normal":
            nn.init.normal_(self.vectors)

    def forward(self, h: Tensor) -> Tensor:  # (rows, tokens, d) -> the same
        if self.where.found is None or self.where.found.shape != h.shape[:2]:
            raise ConfigError("pasta finds special tokens by their ids: give the model input_ids, not inputs_embeds.")
        return h + F.embedding(self.where.found, F.pad(self.vectors, (0, 0, 0, 1))).to(h.dtype)


class Specials:
    """Where the special tokens of the present batch are. As an object, it is copied with the model."""

    def __init__(self, ids: tuple[int, ...], count: int) -> None:
        self.ids, self.count = ids, count
        self.found: Tensor | None = None  # (rows, tokens) int64

    def forget(self, module: nn.Module, args: Any) -> None:
        """A forward pass begins."""
        del module, args
        self.found = None

    def look(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The embedding is given its ids."""
        del module
        special = torch.isin(args[0], torch.tensor(self.ids, device=args[0].device))
        number = special.long().cumsum(-1) - 1
        self.found = torch.where(special & (number < self.count), number, self.count)


def specials(tokenizer: Any, texts: int) -> list[int]:
    """The ids of the special tokens that a tokenizer puts around so many texts, in their order.

    Raises ConfigError for a tokenizer that puts none.
    """
    found = list(tokenizer(*[""] * texts)["input_ids"])
    if not found:
        raise ConfigError(
            f"pasta trains vectors at special tokens, and {type(tokenizer).__name__} puts none into rows."
        )
    return found


def put_on(wanted: Wanted) -> Injected:
    """Puts vectors before every layer. Raises ConfigError for ids that are not known, and for two stacks of layers."""
    model, o = wanted.model, wanted.options
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    layers = {role.block: role for role in of_kind(wanted.found, "ffn2") if role.block}
    if o["ids"] == AUTO:
        raise ConfigError(
            "pasta: ids=auto are those of the tokenizer, which is not at hand here. Name them, as in "
            "pasta:ids=101+102,count=3 for a BERT and pairs of texts; selectune.adapters.for_tokenizer finds them."
        )
    if embedding is None or not layers or any(role.stack for role in layers.values()):
        raise ConfigError(
            f"pasta needs an embedding of tokens and one stack of layers; {type(model).__name__} differs."
        )
    where = Specials(tuple(map(int, o["ids"].split("+"))), o["count"] or PAIR)
    children: dict[str, tuple[nn.Module, Tensor]] = {}
    for block, role in layers.items():
        layer = model.get_submodule(role.name)
        children[block] = Pasta(where.count, width(layer), o["init"], where), cast(Tensor, layer.weight)
    trunk = model.register_forward_pre_hook(where.forget), embedding.register_forward_pre_hook(where.look)
    hook = lambda path, module, child: [module.register_forward_pre_hook(_before, with_kwargs=True)]  # noqa: E731
    return Injected(model, put_children(model, NAME, children, hook, trunk))


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (module.pasta(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": module.pasta(kwargs["hidden_states"])}
