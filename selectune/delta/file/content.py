"""The content of a delta as one value: its patches, its dense tensors and its info."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Self

import torch
from torch import Tensor

from selectune.bits import raw
from selectune.delta.file import format as layout
from selectune.delta.file import parts
from selectune.delta.file.fingerprint import delta_fingerprint, digest_bits
from selectune.delta.file.parts import Dense, Part, Patch
from selectune.delta.file.schema import canonical_json, check_info, parse_json
from selectune.errors import DeltaError, DeltaFormatError


class Content:
    """The parts of a delta, and its bytes. It never changes. `Delta` explains the arguments and adds the verbs."""

    def __init__(self, patches: Sequence[Patch], dense: Sequence[Dense], info: Mapping[str, Any]) -> None:
        own = [parts.own_patch(patch) for patch in patches if patch.indices.numel() or patch.zeroed]
        whole = [parts.own_dense(entry) for entry in dense]
        parts.check_parts(own, whole)
        self._set(own, whole, _complete(info, own, whole))

    def _set(self, patches: Sequence[Patch], dense: Sequence[Dense], info: dict[str, Any]) -> None:
        self._patches, self._dense, self._info = tuple(patches), tuple(dense), info
        self._digest: str | None = None
        self._nbytes: int | None = None

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> Self:
        """Read a delta from the bytes of its file; raises DeltaFormatError if they are not an intact delta."""
        delta = cls.__new__(cls)
        delta._set(*layout.decode(data))
        return delta

    def to_bytes(self) -> bytes:
        """The bytes of the delta's file: the same delta always gives the same bytes."""
        data = layout.encode(self._patches, self._dense, self._info)
        self._nbytes = len(data)
        return data

    @property
    def patches(self) -> tuple[Patch, ...]:
        """Scattered scalars, one patch per tensor, in the model's parameter order."""
        return self._patches

    @property
    def dense(self) -> tuple[Dense, ...]:
        """Tensors recorded whole: trained densely, or buffers that changed."""
        return self._dense

    @property
    def parts(self) -> tuple[Part, ...]:
        """All patches, then all dense tensors."""
        return (*self._patches, *self._dense)

    @property
    def support(self) -> dict[str, Tensor]:
        """{parameter name: flat row-major indices, int64 `(n,)`, rising}."""
        return {patch.name: patch.indices for patch in self._patches}

    @property
    def values(self) -> dict[str, Tensor]:
        """{parameter name: new values `(n,)` in the weight's dtype}, aligned with `support`."""
        return {patch.name: patch.values for patch in self._patches}

    @property
    def info(self) -> dict[str, Any]:
        """A copy of the record: method, budget, selected, base, versions."""
        return copy.deepcopy(self._info)

    @property
    def selected(self) -> int:
        """Number of scattered scalars."""
        return self._info["selected"]

    @property
    def reversible(self) -> bool:
        """Whether the delta carries the base's values, so that it can be reverted where it was merged."""
        return bool(self.parts) and all(part.old is not None for part in self.parts)

    @property
    def beside(self) -> bool:
        """Whether some of its values are offsets beside quantised weights, which never move."""
        return any(patch.beside for patch in self._patches)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.to_bytes()) if self._nbytes is None else self._nbytes

    @property
    def digest(self) -> str:
        """16 hex digits that depend on the values that the delta writes and on their places, and on nothing else."""
        if self._digest is None:
            found = hashlib.sha256()
            for patch in self._patches:
                kind = ["zeroed"] * patch.zeroed + ["beside"] * patch.beside
                found.update(canonical_json([patch.name, *patch.shape, patch.indices.numel(), *kind]).encode())
                found.update(raw(patch.indices).data)
                found.update(digest_bits(patch.values).encode())
            for entry in self._dense:
                found.update(canonical_json([entry.kind, entry.name]).encode())
                found.update(digest_bits(entry.tensor).encode())
            self._digest = found.hexdigest()[:16]
        return self._digest

    @property
    def label(self) -> str:
        """The name of this delta in messages: its method, its size and the beginning of its digest."""
        whole = f" and {len(self._dense)} whole tensors" if self._dense else ""
        return f"{self._info['method'].get('name', 'delta')} of {self.selected} scalars{whole} ({self.digest[:8]})"

    def __eq__(self, other: object) -> bool:
        return self.to_bytes() == other.to_bytes() if isinstance(other, Content) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        total = sum(math.prod(patch.shape) for patch in self._patches)
        share = f": {self.selected / total:.2%} of their {total:,}" if total else ""
        return f"<{type(self).__name__} {self.label} in {len(self._patches)} tensors{share}>"


def refuse_beside(delta: Content, what: str) -> None:
    """Raises DeltaError if the delta has offsets beside quantised weights, which cannot be `what`."""
    if delta.beside:
        raise DeltaError(
            f"{delta.label} was trained beside quantised weights, whose bits stay as they are, so it cannot be {what}. "
            "Keep it beside its base (apply, Shelf), or write the sum as plain floats: selectune export dequantised."
        )


def versions() -> dict[str, str]:
    """Versions of selectune and torch, as a delta records them."""
    try:
        own = metadata.version("selectune")
    except metadata.PackageNotFoundError:
        own = "0"
    return {"selectune": own, "torch": str(torch.__version__)}


def _complete(info: Mapping[str, Any], patches: Sequence[Patch], dense: Sequence[Dense]) -> dict[str, Any]:
    """`info` with defaults and fingerprint, as plain JSON; nothing in it is shared with the caller's."""
    total = sum(patch.indices.numel() for patch in patches)
    if not isinstance(info.get("base"), Mapping) or not info["base"].get("structure"):
        raise DeltaFormatError('a delta needs info["base"] with the base\'s structure: take it from base_info(model)')
    full = {"method": {}, "budget": None, "selected": total, "versions": versions(), **info}
    base = {"id": None, "revision": None, "seed": None, "initialised": [], "weights": None, **info["base"]}
    base["fingerprint"] = delta_fingerprint(base["structure"], patches, dense)
    plain = parse_json(canonical_json({**full, "base": base}), "info")
    check_info(plain, total)
    return plain
