"""Values with tensors in them: packed into JSON and named tensors, unpacked again, and held against a form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selectune.errors import ConfigError


def own(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain values as they are; tensors go into `tensors` and leave {"tensor": key} behind."""
    if isinstance(value, Tensor):
        tensors[path] = own(value)
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {key: packed(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [packed(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
    return value


def unpacked(value: Any, path: str, tensors: Mapping[str, Any], used: set[str]) -> Any:
    """Undoes `packed` and adds the tensors' keys to `used`; ConfigError for a reference to a wrong tensor, and NaN."""
    if isinstance(value, Mapping) and value.keys() == {"tensor"}:
        tensor = tensors.get(path) if value["tensor"] == path else None
        if not isinstance(tensor, Tensor):
            raise ConfigError(f'The state says {value!r:.80} where its tensor "{path}" belongs.')
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ConfigError(f'The state holds NaN in "{path}": the run broke before it was saved.')
        used.add(path)
        return own(tensor)
    if isinstance(value, Mapping):
        return {key: unpacked(item, f"{path}.{key}", tensors, used) for key, item in value.items()}
    if isinstance(value, list):
        return [unpacked(item, f"{path}.{number}", tensors, used) for number, item in enumerate(value)]
    return value


def fits(value: Any, form: Any) -> bool:
    """Whether a value has a form, which is written like the value itself:

    a type       a value of exactly this type      a dict, a list   the same keys or length, and each part fits
    a dtype      a vector of this dtype            a tuple          one of its forms
    a tensor     a tensor of its shape and dtype   None             None
    """
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, dict):
        return isinstance(value, Mapping) and value.keys() == form.keys() and all(fits(value[k], form[k]) for k in form)
    if isinstance(form, list):
        return type(value) is list and len(value) == len(form) and all(map(fits, value, form))
    if isinstance(form, Tensor):
        return isinstance(value, Tensor) and value.shape == form.shape and value.dtype == form.dtype
    if isinstance(form, torch.dtype):
        return isinstance(value, Tensor) and value.ndim == 1 and value.dtype == form
    return value is None if form is None else type(value) is form


def ascends(indices: Tensor, size: int) -> bool:
    """Whether indices (n,) ascend, none of them twice, within [0, size)."""
    within = not indices.numel() or (int(indices[0]) >= 0 and int(indices[-1]) < size)
    return within and bool((indices[1:] > indices[:-1]).all())


def need(fine: Any, message: str) -> None:
    """Raises ConfigError with this message unless `fine`."""
    if not fine:
        raise ConfigError(message)
