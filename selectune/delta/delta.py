"""The delta: trained values and where they go, applied to a base model and taken off again."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selectune.bits import raw, same_bits
from selectune.delta.file import format as layout
from selectune.delta.file import parts
from selectune.delta.file.fingerprint import Inventory, delta_fingerprint, digest_bits
from selectune.delta.file.parts import Dense, Patch
from selectune.delta.file.schema import canonical_json, check_info, parse_json
from selectune.delta.live import apply as live
from selectune.delta.live.writing import write_all
from selectune.errors import DeltaError, DeltaFormatError, DeltaStateError
from selectune.files import make_folder, read_owned, write_durably

if TYPE_CHECKING:
    from selectune.delta.live.verify import Report

DELTA_FILE = "delta.safetensors"
"""Name of the delta's file in a directory."""

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".distcp"}


class Delta:
    """Values of some scalars of a model: applied to the base, reverted bit for bit, shipped as one file.

    `patches` (scattered scalars) and `dense` (whole tensors) are copied. `info` needs `info["base"]` from
    `base_info(base_model)`; the other keys have defaults. Patches without scalars are dropped, unless they are zeroed.

    Raises DeltaError for parts that do not fit each other, NonFiniteError for NaN or infinity among the
    values, DeltaFormatError for an `info` outside the schema (docs/delta-format.md).
    """

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
    def from_bytes(cls, data: bytes | bytearray) -> Delta:
        """Read a delta from the bytes of its file; raises DeltaFormatError for whatever is wrong."""
        delta = cls.__new__(cls)
        delta._set(*layout.decode(data))
        return delta

    def to_bytes(self) -> bytes:
        """The bytes of the delta's file: the same delta always gives the same bytes."""
        return layout.encode(self._patches, self._dense, self._info)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file durably: `path` itself if it ends in .safetensors, else `path`/delta.safetensors.

        After it returned the file survives a crash; if it raises DeltaError, what was there before still is.
        """
        path = Path(path)
        if path.suffix != ".safetensors" or path.is_dir():
            path = path / DELTA_FILE
        try:
            make_folder(path.parent)
        except (OSError, ValueError) as error:  # the latter of a NUL, say
            why = getattr(error, "strerror", None) or error
            raise DeltaError(f"cannot make the directory {str(path.parent)!a}: {why}") from error
        data = self.to_bytes()
        self._nbytes = len(data)
        return write_durably(path, data)

    # --- what it holds --------------------------------------------------------------------------------------

    @property
    def patches(self) -> tuple[Patch, ...]:
        """Scattered scalars, one patch per tensor, in the model's parameter order."""
        return self._patches

    @property
    def dense(self) -> tuple[Dense, ...]:
        """Tensors recorded whole: trained densely, or buffers that changed."""
        return self._dense

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
        """A copy of what is recorded: method, budget, selected, base, versions."""
        return copy.deepcopy(self._info)

    @property
    def selected(self) -> int:
        """Number of scattered scalars."""
        return self._info["selected"]

    @property
    def reversible(self) -> bool:
        """Whether the delta carries the base's values, so that it can be reverted where it was merged."""
        return bool(self._patches or self._dense) and not any(
            [patch.base_values is None for patch in self._patches]
            + [entry.base_tensor is None for entry in self._dense]
        )

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        if self._nbytes is None:
            self._nbytes = len(self.to_bytes())
        return self._nbytes

    @property
    def digest(self) -> str:
        """16 hex digits over what the delta writes and where; `info` and old values do not count."""
        if self._digest is None:
            found = hashlib.sha256()
            for patch in self._patches:
                zeroed = ["zeroed"] if patch.zeroed else []
                found.update(canonical_json([patch.name, *patch.shape, patch.indices.numel(), *zeroed]).encode())
                found.update(raw(patch.indices).data)
                found.update(digest_bits(patch.values).encode())
            for entry in self._dense:
                found.update(canonical_json([entry.kind, entry.name]).encode())
                found.update(digest_bits(entry.tensor).encode())
            self._digest = found.hexdigest()[:16]
        return self._digest

    @property
    def label(self) -> str:
        """How messages call this delta: its method, its size and the beginning of its digest."""
        whole = f" and {len(self._dense)} whole tensors" if self._dense else ""
        return f"{self._info['method'].get('name', 'delta')} of {self.selected} scalars{whole} ({self.digest[:8]})"

    def __eq__(self, other: object) -> bool:
        return self.to_bytes() == other.to_bytes() if isinstance(other, Delta) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        total = sum(math.prod(patch.shape) for patch in self._patches)
        share = f": {self.selected / total:.2%} of their {total:,}" if total else ""
        return f"<Delta {self.label} in {len(self._patches)} tensors{share}>"

    # --- on a model -----------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, stack: bool = False, full: bool = False) -> None:
        """Write the values into the model, in place: all of them or, on any error, none.

        The model must be the delta's base: same tensors, and the same bits wherever the delta writes; with
        `full`, the same bits everywhere (reads all weights). A tensor that no checkpoint held (a fresh head) and that
        the delta stores whole may hold anything; `revert` puts that back. `stack=True` allows it on top of other
        applied deltas; the base is then looked for under them, or, for a delta trained on top of them, in the model
        as it stands.

        Raises BaseMismatchError for another model, DeltaStateError if a tuner is attached, this delta is
        applied already, or another one is (to the model, or to one that shares weights with it: a part, a whole, tied
        weights) and `stack` is False, or if this thread is inside a shelf's `using` block. Other threads take turns.
        """
        with live.exclusive(model, "apply") as hold:
            found = live.ready(model)
            stack_now = live.stack_of(model)
            live.forget_undone(stack_now, found)
            self._check_not_applied(stack_now, stack)
            if not stack:
                live.check_besides(model, hold.claim)
            self._check_fits(found, stack_now, full)
            made = live.writes(self, found)
            layer = live.layer_of(self, made, hold.claim)
            write_all(made, stack_now, [*stack_now, layer])

    def revert(self, model: nn.Module) -> None:
        """Take the delta off again: every bit is what it was before `apply`.

        It must be the last one applied. A delta that carries old values can also be reverted where it was
        merged, or applied in another process, as long as the model holds exactly its values.

        Raises DeltaStateError if it is not applied, is not the last one, or the model changed meanwhile.
        """
        with live.exclusive(model, "revert"):
            self._revert(live.ready(model), live.stack_of(model))

    def _revert(self, found: Inventory, stack: list[live.Layer]) -> None:
        if stack and stack[-1].digest == self.digest:
            write_all(live.undo(self, found, stack[-1].olds), stack, stack[:-1])
            return
        if stack:
            below = any(layer.digest == self.digest for layer in stack)
            raise DeltaStateError(
                f"cannot revert {self.label}: {'it lies under' if below else 'it is not applied, but'} "
                f"{stack[-1].label}{'' if below else ' is'}; revert that first (applied here, oldest first: "
                f"{', '.join(layer.label for layer in stack)})"
            )
        if not self.reversible:
            raise DeltaStateError(
                f"cannot revert {self.label}: it is not applied to this model (or was reverted already), and "
                f"it does not carry the base's values, as one saved with old_values=True does"
            )
        self._revert_merged(found)

    def merge(self, model: nn.Module) -> None:
        """Apply and forget: the values become the model's own. If it is applied, it is only forgotten.

        Raises as `apply` does, and DeltaStateError where other deltas are applied.
        """
        with live.exclusive(model, "merge"):
            stack = live.stack_of(model)
            if [layer.digest for layer in stack] == [self.digest]:
                found = live.ready(model)
                live.check_moved(self, found)
                stack.clear()
                return
            if stack:
                raise DeltaStateError(
                    f"cannot merge {self.label} while other deltas are applied: "
                    f"{', '.join(layer.label for layer in stack)}; revert them first"
                )
            self.apply(model)
            live.stack_of(model).clear()

    @contextmanager
    def applied(self, model: nn.Module, stack: bool = False) -> Iterator[nn.Module]:
        """Apply for the length of a `with` block, and revert after it, also when the block raises.

        Other threads that want to change the model or to read it through a shelf's door wait until the block ends, so
        what the block computes is this delta's. Raises as `apply` and `revert` do.
        """
        with live.exclusive(model, "applied()") as hold:
            self.apply(model, stack=stack)
            try:
                yield model
            finally:
                hold.thread = get_ident()  # a block may end in another thread than it began in
                self.revert(model)

    def verify(self, model: nn.Module, full: bool = False) -> Report:
        """Prove, on a bare base model, what the delta does to it, and leave it as it was.

        Reads all weights twice; `full` also compares them with the recorded digest of the base. A wrong base
        is reported (`report.ok`, `report.problem`), not raised. Raises DeltaStateError if a tuner or another
        delta is on the model.
        """
        from selectune.delta.live.verify import verify

        return verify(self, model, full=full)

    def _check_not_applied(self, stack: list[live.Layer], allowed: bool) -> None:
        if any(layer.digest == self.digest for layer in stack):
            raise DeltaStateError(f"{self.label} is applied to this model already; revert it before applying it again")
        if stack and not allowed:
            raise DeltaStateError(
                f"{stack[-1].label} is applied to this model; revert it first, or pass stack=True to put "
                f"{self.label} on top of it"
            )

    def _check_fits(self, found: Any, stack: list[live.Layer], full: bool) -> None:
        live.check_structure(self, found)
        if full and stack:
            raise DeltaStateError("a full check needs the bare base; revert the deltas that are applied first")
        try:
            live.check_base(self, found)
        except DeltaError:
            if not stack:
                raise
            live.check_base(self, found, under=stack)
        if full:
            live.check_weights(self, found)

    def _revert_merged(self, found: Any) -> None:
        live.check_structure(self, found)
        olds: dict[str, tuple[Any, Tensor]] = {}
        changes = False
        for part, where, new, old in self._with_old():
            olds[found.find[part].name] = (where, old)
            changes |= not same_bits(old, new)
        if not changes or not live.holds(self, found):
            raise DeltaStateError(
                f"cannot revert {self.label}: it is not applied to this model, which does not hold its values"
            )
        write_all(live.undo(self, found, olds), [], [])

    def _with_old(self) -> Iterator[tuple[str, Tensor | None, Tensor, Tensor]]:
        for patch in self._patches:
            if patch.base_values is not None and patch.zeroed:
                yield patch.name, None, patch.whole(), patch.base_values.view(patch.shape)
            elif patch.base_values is not None:
                yield patch.name, patch.indices, patch.values, patch.base_values
        for entry in self._dense:
            if entry.base_tensor is not None:
                yield entry.name, None, entry.tensor, entry.base_tensor


def load(path: str | os.PathLike[str]) -> Delta:
    """Read a delta from its file, or from a directory that holds delta.safetensors.

    The file is read once into memory; nothing in it is run and no other file is opened. Raises DeltaError if
    there is none, DeltaFormatError if it is anything but an intact delta.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / DELTA_FILE).exists():
            raise DeltaError(f"{path} holds no {DELTA_FILE}; expected a directory that selectune saved a delta to")
        path = path / DELTA_FILE
    if path.suffix in _PICKLES:
        raise DeltaFormatError(f"{path} is a pickle by its name; selectune never opens those. Expected *.safetensors")
    try:
        return Delta.from_bytes(read_owned(path, head=(layout.HEAD, layout.check_head)))
    except DeltaFormatError as error:
        if str(path) in str(error):
            raise
        raise DeltaFormatError(f"{path}: {error}") from error


def versions() -> dict[str, str]:
    """Versions of selectune and torch, as a delta records them."""
    try:
        own = metadata.version("selectune")
    except metadata.PackageNotFoundError:
        own = "0"
    return {"selectune": own, "torch": str(torch.__version__)}


def _complete(info: Mapping[str, Any], patches: list[Patch], dense: list[Dense]) -> dict[str, Any]:
    """`info` with defaults and fingerprint, as plain JSON that shares nothing with the caller's."""
    total = sum(patch.indices.numel() for patch in patches)
    if not isinstance(info.get("base"), Mapping) or not info["base"].get("structure"):
        raise DeltaFormatError('a delta needs info["base"] with the base\'s structure: take it from base_info(model)')
    full = {"method": {}, "budget": None, "selected": total, "versions": versions(), **info}
    base = {"id": None, "revision": None, "seed": None, "initialised": [], "weights": None, **info["base"]}
    full["base"] = base
    base["fingerprint"] = delta_fingerprint(base["structure"], patches, dense)
    plain = parse_json(canonical_json(full), "info")
    check_info(plain, total)
    return plain
