"""What a delta is made of: patches (scattered scalars of a tensor) and dense tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selectune.bits import DTYPES, FLOATS, dtype_name, first_non_finite, scatter
from selectune.delta.file.fingerprint import digest_bits
from selectune.delta.file.schema import canonical_name, check_name
from selectune.errors import DeltaError, NonFiniteError

KINDS = ("parameter", "buffer")


@dataclass(frozen=True, eq=False)
class Patch:
    """New values of n scattered scalars of one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    indices: Tensor  # (n,) int64, CPU, flat row-major, strictly increasing
    values: Tensor  # (n,) in `dtype`, CPU: replacement values
    base_digest: str  # digest_bits of the base's values at `indices`
    base_values: Tensor | None = None  # (n,) in `dtype`: the base's values, where kept
    order: Tensor | None = None  # (n,) int32: rank in the order of selection over the whole delta; may be shared
    zeroed: bool = (
        False  # entries that are not listed are 0; base digest and base values (numel,) are of the whole tensor
    )

    @property
    def numel(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)

    def whole(self) -> Tensor:
        """The tensor that a zeroed patch says: its values where they are listed, 0 elsewhere."""
        tensor = torch.zeros(self.numel, dtype=self.dtype)
        scatter(tensor, self.indices, self.values)
        return tensor.view(self.shape)

    @classmethod
    def make(
        cls,
        name: str,
        shape: tuple[int, ...],
        indices: Tensor,
        values: Tensor,
        base_values: Tensor,
        *,
        old_values: bool = False,
        order: Tensor | None = None,
    ) -> Patch:
        """A patch of new and base values `(n,)` at `indices` `(n,)`; the base's are kept if `old_values`."""
        base_values = base_values.detach().cpu()
        return cls(
            name,
            tuple(shape),
            values.dtype,
            indices,
            values,
            digest_bits(base_values),
            base_values if old_values else None,
            order,
        )


@dataclass(frozen=True, eq=False)
class Dense:
    """The new value of a whole tensor: a parameter trained densely, or a buffer that changed."""

    name: str
    kind: str  # "parameter" or "buffer"
    tensor: Tensor  # the new value, whole, CPU
    base_digest: str  # digest_bits of the base's tensor
    base_tensor: Tensor | None = None

    @classmethod
    def make(cls, name: str, kind: str, tensor: Tensor, base_tensor: Tensor, *, old_values: bool = False) -> Dense:
        """A dense entry from a tensor's new and base value; the base's is kept if `old_values`."""
        return cls(name, kind, tensor, digest_bits(base_tensor), base_tensor if old_values else None)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def own_patch(patch: Patch) -> Patch:
    """Copy a patch's tensors, so that nobody else can change them, and give it its canonical name."""
    return replace(
        patch,
        name=canonical_name(patch.name),
        shape=tuple(int(size) for size in patch.shape),
        indices=_own(patch.indices),
        values=_own(patch.values),
        base_values=None if patch.base_values is None else _own(patch.base_values),
        order=None if patch.order is None else _own(patch.order).to(torch.int32),
    )


def own_dense(dense: Dense) -> Dense:
    """Copy a dense entry's tensors and give it its canonical name."""
    return replace(
        dense,
        name=canonical_name(dense.name),
        tensor=_own(dense.tensor),
        base_tensor=None if dense.base_tensor is None else _own(dense.base_tensor),
    )


def check_patch(patch: Patch) -> None:
    """Raise DeltaError unless the patch's parts fit each other; NonFiniteError for NaN or infinity."""
    name, n = check_name(patch.name), patch.indices.numel()
    if patch.dtype not in FLOATS.values():
        raise DeltaError(f'patch "{name}" has dtype {dtype_name(patch.dtype)}; allowed: {", ".join(FLOATS)}')
    if patch.indices.dtype != torch.int64 or patch.indices.dim() != 1:
        raise DeltaError(
            f'indices of "{name}" must be int64 (n,); got {patch.indices.dtype} {tuple(patch.indices.shape)}'
        )
    covered = patch.numel if patch.zeroed else n
    for what, part, size in (("values", patch.values, n), ("base values", patch.base_values, covered)):
        if part is not None and (part.dtype != patch.dtype or part.shape != (size,)):
            raise DeltaError(
                f'{what} of "{name}" must be {dtype_name(patch.dtype)} ({size},); '
                f"got {dtype_name(part.dtype)} {tuple(part.shape)}"
            )
    if n and (int(patch.indices[0]) < 0 or int(patch.indices[-1]) >= patch.numel):
        raise DeltaError(
            f'indices of "{name}" must lie in [0, {patch.numel}); '
            f"got {int(patch.indices[0])} to {int(patch.indices[-1])}"
        )
    if n > 1 and bool((patch.indices.diff() <= 0).any()):
        raise DeltaError(f'indices of "{name}" must rise strictly; some repeat or go back')
    if patch.order is not None and (patch.order.shape != (n,) or (n and int(patch.order.min()) < 0)):
        raise DeltaError(f'order of "{name}" must hold {n} ranks of at least 0; got {tuple(patch.order.shape)}')
    base = patch.base_values
    _check_values(
        name, patch.values, base.view(patch.shape) if patch.zeroed and base is not None else base, patch.base_digest
    )


def check_dense(dense: Dense) -> None:
    """Raise DeltaError unless the entry's parts fit each other; NonFiniteError for NaN or infinity."""
    name, tensor, base = check_name(dense.name), dense.tensor, dense.base_tensor
    if dense.kind not in KINDS:
        raise DeltaError(f'dense "{name}" has kind {dense.kind!r}; allowed: {", ".join(KINDS)}')
    if tensor.dtype not in DTYPES.values():
        raise DeltaError(f'dense "{name}" has dtype {dtype_name(tensor.dtype)}; allowed: {", ".join(DTYPES)}')
    if base is not None and (base.dtype != tensor.dtype or base.shape != tensor.shape):
        raise DeltaError(
            f'base tensor of "{name}" must be {dtype_name(tensor.dtype)} {tuple(tensor.shape)}; '
            f"got {dtype_name(base.dtype)} {tuple(base.shape)}"
        )
    _check_values(name, tensor, base, dense.base_digest)


def _check_values(name: str, values: Tensor, base: Tensor | None, base_digest: str) -> None:
    at = first_non_finite(values)
    if at is not None:
        raise NonFiniteError(
            f'values of "{name}" are not finite: number {at} is {values.reshape(-1)[at].item()}; '
            f"a delta holds finite numbers only"
        )
    if base is not None and digest_bits(base) != base_digest:
        raise DeltaError(f'old values of "{name}" do not have the digest {base_digest} of the base')


def check_parts(patches: list[Patch], dense: list[Dense]) -> None:
    """Check every part, that no name occurs twice, and that old values and order are all there or absent."""
    for patch in patches:
        check_patch(patch)
    for entry in dense:
        check_dense(entry)
    names = [part.name for part in [*patches, *dense]]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})[0]
        raise DeltaError(f'"{twice}" occurs twice in the delta; each tensor is recorded once')
    olds = [patch.base_values is not None for patch in patches] + [entry.base_tensor is not None for entry in dense]
    if any(olds) and not all(olds):
        raise DeltaError("some parts of the delta carry old values and some do not; expected all or none")
    orders = [patch.order for patch in patches if patch.order is not None]
    if orders and len(orders) != len(patches):
        raise DeltaError("some patches carry their order of selection and some do not; expected all or none")
