"""What a delta is made of: patches (scattered scalars of a tensor) and dense tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

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

    kind: ClassVar[str] = "parameter"
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    indices: Tensor  # (n,) int64, CPU, flat row-major, strictly increasing
    values: Tensor  # (n,) in `dtype`, CPU: replacement values
    base_digest: str  # digest_bits of the base's values at `indices`
    base_values: Tensor | None = None  # (n,) in `dtype`: the base's values, where they are kept
    order: Tensor | None = None  # (n,) int32: rank in the order of selection over the whole delta; ranks may be equal
    zeroed: bool = False  # unlisted entries are 0; base digest and base values (numel,) are of the whole tensor
    beside: bool = False  # values are offsets beside a quantised weight, whose stored bits have the base digest

    @property
    def numel(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def where(self) -> Tensor | None:
        """The indices that the patch writes to; None if it writes the whole tensor, as a zeroed patch does."""
        return None if self.zeroed else self.indices

    @property
    def new(self) -> Tensor:
        """What the patch writes at `where`."""
        if not self.zeroed:
            return self.values
        tensor = torch.zeros(self.numel, dtype=self.dtype)
        scatter(tensor, self.indices, self.values)
        return tensor.view(self.shape)

    @property
    def old(self) -> Tensor | None:
        """The base's values at `where`, if the patch carries them; beside a quantised weight they are 0."""
        if self.beside:
            return torch.zeros_like(self.values)
        return self.base_values.view(self.shape) if self.zeroed and self.base_values is not None else self.base_values

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
        """A patch of new and base values `(n,)` at `indices` `(n,)`; it keeps the base's if `old_values`."""
        base = base_values.detach().cpu()
        old = base if old_values else None
        return cls(name, tuple(shape), values.dtype, indices, values, digest_bits(base), old, order)


@dataclass(frozen=True, eq=False)
class Dense:
    """The new value of a whole tensor: a parameter trained densely, or a buffer that changed."""

    where: ClassVar[None] = None  # as of a patch: the whole tensor is written
    name: str
    kind: str  # "parameter" or "buffer"
    tensor: Tensor  # the new value, whole, CPU
    base_digest: str  # digest_bits of the base's tensor
    base_tensor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def new(self) -> Tensor:
        return self.tensor

    @property
    def old(self) -> Tensor | None:
        return self.base_tensor

    @classmethod
    def make(cls, name: str, kind: str, tensor: Tensor, base_tensor: Tensor, *, old_values: bool = False) -> Dense:
        """A dense entry from a tensor's new and base value; it keeps the base's if `old_values`."""
        return cls(name, kind, tensor, digest_bits(base_tensor), base_tensor if old_values else None)


Part = Patch | Dense
"""Both have the values that they write (`new`), their places (`where`), and the base's values there (`old`)."""


def _own(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def own_patch(patch: Patch) -> Patch:
    """Copy a patch's tensors, so that nobody else can change them, and give it its canonical name."""
    order = _own(patch.order)
    return replace(
        patch,
        name=canonical_name(patch.name),
        shape=tuple(int(size) for size in patch.shape),
        indices=_own(patch.indices),
        values=_own(patch.values),
        base_values=_own(patch.base_values),
        order=None if order is None else order.to(torch.int32),
    )


def own_dense(dense: Dense) -> Dense:
    """Copy a dense entry's tensors and give it its canonical name."""
    name = canonical_name(dense.name)
    return replace(dense, name=name, tensor=_own(dense.tensor), base_tensor=_own(dense.base_tensor))


def _check_patch(patch: Patch) -> None:
    name, n = check_name(patch.name), patch.indices.numel()
    if patch.dtype not in FLOATS.values():
        raise DeltaError(f'patch "{name}" has dtype {dtype_name(patch.dtype)}; allowed: {", ".join(FLOATS)}')
    if patch.indices.dtype != torch.int64 or patch.indices.dim() != 1:
        raise DeltaError(
            f'the indices of "{name}" must be int64 (n,); got {patch.indices.dtype} {tuple(patch.indices.shape)}'
        )
    odd = patch.dtype != torch.float32 or len(patch.shape) != 2 or patch.zeroed or patch.base_values is not None
    if patch.beside and odd:
        raise DeltaError(
            f'the offsets beside "{name}" must be float32 beside a matrix, without old values and not zeroed; got '
            f"{dtype_name(patch.dtype)} of shape {patch.shape}"
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
            f'the indices of "{name}" must lie in [0, {patch.numel}); '
            f"got {int(patch.indices[0])} to {int(patch.indices[-1])}"
        )
    if n > 1 and bool((patch.indices.diff() <= 0).any()):
        raise DeltaError(f'the indices of "{name}" must increase strictly; some repeat or decrease')
    if patch.order is not None and (patch.order.shape != (n,) or (n and int(patch.order.min()) < 0)):
        raise DeltaError(f'order of "{name}" must hold {n} ranks of at least 0; got {tuple(patch.order.shape)}')
    _check_values(name, patch.values, None if patch.beside else patch.old, patch.base_digest)


def _check_dense(dense: Dense) -> None:
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
        raise DeltaError(f'the old values of "{name}" do not have the digest of the base, {base_digest}')


def check_parts(patches: Sequence[Patch], dense: Sequence[Dense]) -> None:
    """Check every part. No name may occur twice; either all parts have old values or none, and so for the order.

    Raises DeltaError for parts that do not fit each other, NonFiniteError for NaN or infinity among new values.
    """
    for patch in patches:
        _check_patch(patch)
    for entry in dense:
        _check_dense(entry)
    parts: list[Part] = [*patches, *dense]
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})[0]
        raise DeltaError(f'"{twice}" occurs twice in the delta; each tensor is recorded once')
    replacing = [part for part in parts if isinstance(part, Dense) or not part.beside]
    if len({part.old is None for part in replacing}) > 1:
        raise DeltaError("some parts of the delta carry old values and some do not; expected all or none")
    if len({patch.order is None for patch in patches}) > 1:
        raise DeltaError("some patches carry their order of selection and some do not; expected all or none")
