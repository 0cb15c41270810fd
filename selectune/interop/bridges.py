"""The doors: a delta goes out in another tool's form, or comes in from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from selectune.adapters import KINDS
from selectune.bits import int_view, same_bits
from selectune.delta import Delta, Dense, Patch, inventory, load, model_info
from selectune.delta.file.content import refuse_beside
from selectune.errors import ConfigError, DeltaError, NothingTrainedError, did_you_mean
from selectune.files import staged
from selectune.interop.from_peft import read_peft
from selectune.interop.merged import dequantised, merged, mergekit
from selectune.interop.pairs import read_pairs, write_pairs
from selectune.interop.patches import vllm
from selectune.interop.to_peft import to_peft
from selectune.interop.toolkit import read_summary
from selectune.models.bases import DTYPES, LoadedModel, load_model
from selectune.models.restore import Source, apply_to, load_base, task_of
from selectune.tasks import Head, Task

OUT: dict[str, Callable[..., dict[str, Any]]] = {
    "merged": merged,
    "dequantised": dequantised,
    "peft": to_peft,
    "vllm": vllm,
    "mergekit": mergekit,
    "safetensors-diff": write_pairs,
}
IN: dict[str, Callable[..., Any]] = {"peft": read_peft, "toolkit": read_summary, "safetensors-diff": read_pairs}
"""Readers: (file, base model) -> (name, new tensor), one at a time."""
WHOLE = ("merged", "mergekit")
"""Kinds that hold an adapter's change of weights too."""


def export(
    kind: str, source: Source, path: str | Path, out: str | Path, task: Task | None = None, served: str | None = None
) -> dict[str, Any]:
    """Writes a delta and its base as the folder `out`, in the form of `kind` (`OUT`): all of it, or nothing.

    `served`: the dtype of a server's weights, for vllm. The base is checked first, in full if the delta has the digest
    of all weights. Raises ConfigError for an unknown kind, a folder that is not empty, and what `kind` cannot hold;
    DeltaError and BaseMismatchError as `Delta.apply` does.
    """
    writer = OUT[_known(kind, OUT)]
    if served is not None and (kind != "vllm" or served not in DTYPES):
        raise ConfigError(f"served={served} is for kind vllm, and one of {', '.join(DTYPES)}; got kind {kind}.")
    delta = load(path)
    if kind != "dequantised":
        refuse_beside(delta, f"exported as {kind}")
    if "module" in delta.info and kind not in (*WHOLE, "peft"):
        on = delta.info["module"]["kind"]
        fits = f"Export it as {' or '.join(WHOLE)}, which fold it into the weights."
        if not KINDS[on].merges:
            fits = (
                f"No other tool takes it: {on} is no change of the base's weights, and selectune eval uses it as it is."
            )
        raise ConfigError(f"The delta was trained on {on}, which {kind} does not hold beside it. {fits}")
    with staged(out) as folder:
        loaded = load_base(source, delta, task or task_of(delta))
        apply_to(delta, loaded)  # every check
        delta.revert(loaded.model)
        told = writer(delta, loaded, source, folder, None if served is None else DTYPES[served])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"kind": kind, "out": str(out), "model": source.model, "delta": delta.label, "bytes": size, **told}


def import_delta(kind: str, file: str | Path, source: Source, head: Head | None = None, seed: int = 0) -> Delta:
    """The delta that turns a base into what another tool (`IN`) wrote: every scalar whose bits differ.

    `head`, `seed`: the class and outputs of a new head, and the seed that it is drawn from; a head that the file holds
    whole replaces it. Raises ConfigError for an unknown kind, DeltaFormatError for a file that is not of this kind,
    DeltaError for one that does not fit the base, NothingTrainedError if it changes nothing.
    """
    reader = IN[_known(kind, IN)]
    if not Path(file).exists():
        raise DeltaError(f"cannot read {file}: no such file or folder")
    loaded = load_model(source.model, head, seed, source.revision, source.dtype, source.trust_remote_code, False)
    return delta_of(loaded, kind, reader(Path(file), loaded.model))


def delta_of(loaded: LoadedModel, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> Delta:
    """A delta from a base and a reader's new tensors."""
    found = inventory(loaded.model)
    fresh = {found.find[name].name for name in loaded.initialised if name in found.find}
    patches, dense, seen = {}, {}, set()
    for given, new in tensors:
        entry = found.find[given]
        name, old = entry.name, entry.tensor.detach()
        if name in seen:
            raise DeltaError(f'"{given}" comes twice, or under two names of one tied tensor')
        seen.add(name)
        if new.shape != old.shape or new.dtype != old.dtype:
            raise DeltaError(
                f'"{given}" is {new.dtype} {tuple(new.shape)} in the file, {old.dtype} {tuple(old.shape)} in the base'
            )
        if entry.kind == "buffer" or name in fresh:
            if not same_bits(old, new):
                dense[name] = Dense.make(name, entry.kind, new, old)
            continue
        flat = (int_view(new) != int_view(old)).reshape(-1).nonzero().reshape(-1)
        if flat.numel():
            at = new.reshape(-1)[flat], old.reshape(-1)[flat]
            patches[name] = Patch.make(name, tuple(old.shape), flat, *at)
    if not patches and not dense:
        raise NothingTrainedError("the file changes no scalar of this base; is it of another model, or untrained?")
    order = [entry.name for entry in found.entries]
    info: dict[str, Any] = {"method": {"name": kind, "imported": True}, "base": loaded.base(full=True)}
    if (described := model_info(loaded.model)) is not None:
        info["model"] = described
    return Delta([patches[n] for n in order if n in patches], [dense[n] for n in order if n in dense], info)


def _known(kind: str, kinds: dict[str, Any]) -> str:
    if kind not in kinds:
        raise ConfigError(f"Unknown kind '{kind}'. Known: {', '.join(kinds)}.{did_you_mean(kind, kinds)}")
    return kind
