"""Looks at a model before it is tuned: what is in scope, what is tied, what is left out, whether attach works."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import selectune as st
from selectune.delta import inventory
from selectune.doctor.checks import attempt
from selectune.errors import SelectuneError
from selectune.models.bases import load_model
from selectune.train import Tuner

BUDGET = 1_000  # of the trial; smaller if fewer scalars are in scope
NAMED = 3  # tensors named in a summary


def look(name: str) -> dict[str, Any]:
    """What selectune would do with this model, as plain values. Raises ModelError if it cannot be loaded."""
    return inspect(load_model(name, None, 6).model)


def inspect(model: nn.Module) -> dict[str, Any]:
    """The same for a model in memory. Its bits do not change."""
    found, problem = attempt(lambda: st.Scope().find(model))
    scoped = () if found is None else found.tensors
    out = left_out(model, {id(tensor.parameter) for tensor in scoped if tensor.quantised is not None})
    said = None
    if problem is None:
        said, problem = attempt(lambda: attached(model, sum(t.eligible for t in scoped)))
    dtypes: Counter[str] = Counter()
    for tensor in scoped:
        form = str(tensor.form.dtype).removeprefix("torch.") if tensor.quantised is None else "quantised"
        dtypes[form] += tensor.form.numel()
    tied = {tensor.name: list(tensor.names[1:]) for tensor in scoped if len(tensor.names) > 1}
    shares = ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.items())
    reasons = Counter(out.values())
    return {
        "class": type(model).__name__,
        "in_scope": {
            "summary": f"{len(scoped)} tensors: {shares}" if scoped else "nothing",
            "dtypes": dict(dtypes),
            "tensors": {t.name: {"shape": list(t.form.shape), "padding": len(t.padding)} for t in scoped},
        },
        "tied": {"summary": _some(f"{first} = {' = '.join(more)}" for first, more in tied.items()) or "none", **tied},
        "left_out": {
            "summary": "; ".join(
                f"{count} {why} ({_some(name for name, because in out.items() if because == why)})"
                for why, count in reasons.items()
            )
            or "nothing",
            "tensors": out,
        },
        "attach": {"works": problem is None, "summary": problem or said},
    }


def left_out(model: nn.Module, quantised: set[int]) -> dict[str, str]:
    """The parameters that no selection would choose from, each with a short reason. `quantised`: ids in scope."""
    named = ((name, tensor) for name, tensor in model.named_parameters() if id(tensor) not in quantised)
    return {name: why for name, tensor in named if (why := _why_not(tensor))}


def _why_not(tensor: Tensor) -> str | None:
    if tensor.is_complex():
        return "complex"
    if tensor.is_quantized or not tensor.is_floating_point():
        return f"quantised or whole numbers, {str(tensor.dtype).removeprefix('torch.')}"
    return None if tensor.requires_grad else "frozen"


def attached(model: nn.Module, eligible: int) -> str:
    """Attaches, checks and detaches; raises if that fails or changes a bit of the model."""
    before = _checksums(model)
    tuner = st.attach(model, st.random(budget=min(BUDGET, eligible)))
    try:
        seen = uses(tuner, model)
    finally:
        tuner.detach()
    moved = [name for name, sum_ in _checksums(model).items() if before[name] != sum_]
    if moved:
        raise SelectuneError(f"After attach and detach, {_some(moved)} are not what they were, bit for bit.")
    return f"works and leaves no trace{seen}"


def uses(tuner: Tuner, model: nn.Module) -> str:
    """What `Tuner.check` finds on the model's `dummy_inputs`, as the end of a sentence."""
    batch = getattr(model, "dummy_inputs", None)
    if not isinstance(batch, dict):
        return ""
    found = tuner.check(batch, _loss)
    none = f", {len(found.without_gradient)} get none" if found.without_gradient else ""
    return f"; the gradients of {found.tensors} tensors are those of plain autograd{none}"


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """A scalar that depends on every output."""
    device = next(model.parameters()).device
    output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    values = output.values() if isinstance(output, dict) else output
    parts = [value.float().square().mean() for value in values if isinstance(value, Tensor) and value.requires_grad]
    if not parts:
        raise SelectuneError("No output of the model depends on its weights, so there is nothing to train.")
    return torch.stack(parts).sum()


def _checksums(model: nn.Module) -> dict[str, str]:
    return {entry.name: entry.digest() for entry in inventory(model).entries}


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:NAMED]) + (f" and {len(every) - NAMED} more" if len(every) > NAMED else "")
