"""The delta between any two models of one structure."""

from __future__ import annotations

from torch import nn

from selectune.bits import dtype_name, gather, int_view, same_bits
from selectune.delta.delta import Delta
from selectune.delta.file.fingerprint import Inventory, inventory
from selectune.delta.file.model_info import base_info, model_info
from selectune.delta.file.parts import Dense, Patch
from selectune.errors import BaseMismatchError
from selectune.files.reading import some


def diff(base_model: nn.Module, tuned_model: nn.Module, *, old_values: bool = False) -> Delta:
    """The delta that turns `base_model` into `tuned_model`: scalars whose bits differ, changed buffers whole.

    It reads both models once. Raises BaseMismatchError if their structures differ, NonFiniteError if a tuned value is
    NaN or infinite.

    >>> import copy, torch
    >>> base = torch.nn.Linear(4, 3)
    >>> tuned = copy.deepcopy(base)
    >>> with torch.no_grad():
    ...     tuned.weight[1, 2] = 5.0
    >>> {name: indices.tolist() for name, indices in diff(base, tuned).support.items()}
    {'weight': [6]}
    """
    base, tuned = inventory(base_model), inventory(tuned_model)
    _check_same_structure(base, tuned)
    patches, dense = [], []
    for entry in tuned.entries:
        old, new = base.find[entry.name].tensor, entry.tensor
        if entry.quantised is not None:
            if entry.digest() != base.find[entry.name].digest():
                raise BaseMismatchError(
                    f'"{entry.name}" is quantised and differs between the two models; a delta holds no stored bits of '
                    "a quantised weight. Save the delta of the run instead (tuner.save)."
                )
            continue
        if entry.kind == "buffer":
            if not same_bits(old, new):
                dense.append(Dense.make(entry.name, "buffer", new, old, old_values=old_values))
            continue
        # reshape gives row-major order whatever the strides, as patches count entries
        changed = int_view(old).to(new.device) != int_view(new)
        indices = changed.reshape(-1).nonzero().reshape(-1).cpu()
        if len(indices):
            values, before = gather(new, indices), gather(old, indices)
            patches.append(Patch.make(entry.name, tuple(new.shape), indices, values, before, old_values=old_values))
    described = model_info(base_model)
    info = {"method": {"name": "diff"}, "base": base_info(base_model)}
    return Delta(patches, dense, info if described is None else {**info, "model": described})


def _check_same_structure(base: Inventory, tuned: Inventory) -> None:
    problems = []
    for name in sorted(base.find.keys() | tuned.find.keys()):
        old, new = base.find.get(name), tuned.find.get(name)
        if old is None or new is None:
            problems.append(f'"{name}" is only in the {"tuned" if old is None else "base"} model')
        elif old.tensor.shape != new.tensor.shape or old.tensor.dtype != new.tensor.dtype or old.kind != new.kind:
            problems.append(
                f'"{name}" is {dtype_name(old.tensor.dtype)} {tuple(old.tensor.shape)} in the base, '
                f"{dtype_name(new.tensor.dtype)} {tuple(new.tensor.shape)} in the tuned model"
            )
        elif sorted(old.names) != sorted(new.names):
            problems.append(
                f'"{name}" is one with {sorted(old.names)} in the base, with {sorted(new.names)} when tuned'
            )
    if problems:
        raise BaseMismatchError(
            f"the two models differ in more than values: {some(problems)}. "
            f"A delta needs the same tensors, shapes, dtypes and ties"
        )
