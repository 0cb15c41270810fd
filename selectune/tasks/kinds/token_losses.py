"""The losses of a language model's tokens with few logits at once: 512 tokens of 49,152 words would be 100 MB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 1 << 23
"""The most logits that are formed at once: 32 MB of float32, and as much for their logarithms."""


def summed_losses(model: Any, batch: Mapping[str, Tensor], labels: Tensor) -> list[float]:
    """The negative log-likelihood of each row's labelled tokens, given those before them, summed in float64, in nats.

    `batch`: input_ids and attention_mask, (rows, tokens), padded at the end. `labels`, of that shape: the tokens that
    count, and -100 elsewhere. The model computes its states once, and only those that predict a labelled token are
    multiplied by the vocabulary, in pieces. A model that does more to its logits than that (a cap, a scale) gets whole
    rows of logits, one row after another.
    """
    targets = labels[:, 1:]
    wanted = targets != -100
    counts = wanted.sum(-1).tolist()
    aims = targets[wanted]
    states, head = _states(model, batch), model.get_output_embeddings()
    if states is None:
        losses = [
            F.cross_entropy(model(**_row(batch, i)).logits[0, -labels.shape[1] : -1][where].float(), targets[i][where],
                            reduction="none")
            for i, where in enumerate(wanted)
        ]  # fmt: skip
    else:
        flat = states[:, -labels.shape[1] : -1][wanted]  # virtual tokens, if there are any, come first
        size = max(1, AT_ONCE // head.weight.shape[0])
        losses = [
            F.cross_entropy(head(flat[at : at + size]).float(), aims[at : at + size], reduction="none")
            for at in range(0, len(aims), size)
        ]
    found = torch.cat(losses).double().cpu() if losses else torch.zeros(0)
    return [float(row.sum()) for row in found.split(counts)]


def _row(batch: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: tensor[i : i + 1] for name, tensor in batch.items()}


def _states(model: Any, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The states before the last layer, of which logits are made; None if the logits are not just its output.

    The last layer is given the last position only, so the forward pass forms one row of logits for each text.
    """
    head = model.get_output_embeddings()
    seen: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:
            return None
        seen.append(args[0])
        return (args[0][:, -1:], *args[1:])

    def after(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output)

    if head is None:
        return None
    hooks = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        logits = model(**batch).logits
    finally:
        for hook in hooks:
            hook.remove()
    plain = len(seen) == 2 and torch.equal(logits, seen[1].to(logits.dtype))
    return seen[0] if plain else None
