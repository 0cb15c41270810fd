"""A saved delta on its base again: loaded, measured, verified, or merged into a model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import selectune as st
from selectune import plugins, tasks
from selectune.adapters import belongs, spec_of
from selectune.delta import Delta, Report, canonical_name, inventory
from selectune.delta.file.content import refuse_beside
from selectune.errors import BaseMismatchError, ConfigError, DeltaError, TaskError
from selectune.files import staged
from selectune.models.adapted import mergeable, virtual_tokens, with_adapter_of
from selectune.models.bases import DTYPES, LoadedModel, device, load_model, longest, quiet
from selectune.models.evaluate import Evaluation, evaluate
from selectune.models.retention import HeldOut, held_out, text_of
from selectune.quantised import quantised_weights
from selectune.tasks import OWN, Head, Task


@dataclass(frozen=True)
class Source:
    """The base model of a delta, and the options of loading it."""

    model: str
    revision: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False


def task_of(delta: Delta) -> Task | None:
    """The task that the delta records, if any; not one of the user's own rows, whose head is that of `model`.

    Raises UnknownTaskError for a task that is not known here.
    """
    name = delta.info["method"].get("task")
    return in_form(plugins.task(name), delta) if isinstance(name, str) and name != OWN else None


def in_form(task: Task, delta: Delta | None) -> Task:
    """The task as a cloze, if the delta was trained on one. Raises TaskError for a record that is none."""
    told = None if delta is None else cloze_of(delta)
    return (
        task if told is None else tasks.as_cloze(task, told["pattern"], tuple(told["words"]), told.get("context") or "")
    )


def cloze_of(delta: Delta) -> dict[str, Any] | None:
    """The pattern, words and labels that a delta records, checked, since anybody may have written the file."""
    told = delta.info["method"].get("cloze")
    if told is None:
        return None
    lists = [told.get(name) for name in ("words", "labels")] if isinstance(told, dict) else [None]
    texts = all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in lists)
    whole = texts and isinstance(told, dict) and isinstance(told.get("context"), str | None)
    if not whole or not isinstance(told.get("pattern"), str):
        raise TaskError(f"The delta records a cloze without its pattern, words and labels: {told!r:.80}.")
    return told


def load_base(source: Source, delta: Delta, task: Task | None, tokenizer: bool = True) -> LoadedModel:
    """The base that a delta needs: its class, head and adapter, drawn from its seed, in the dtype of its values.

    The head is that of `task`, else of the model that the delta records, else of the task that it records.
    """
    return with_adapter_of(_bare_base(source, delta, task, tokenizer), delta)


def _bare_base(source: Source, delta: Delta, task: Task | None, tokenizer: bool = True) -> LoadedModel:
    """The base that a delta needs, without its adapter."""
    head = _head(delta) if task is None else task.head
    if head is None and (recorded_task := task_of(delta)) is not None:
        head = recorded_task.head
    written = [(p.name, p.dtype) for p in delta.patches] + [(d.name, d.tensor.dtype) for d in delta.dense]
    on = spec_of(delta)  # an adapter's tensors may be fp32 on bf16
    floats = [d for name, d in written if d.is_floating_point and (on is None or not belongs(on.kind, name))]
    named = delta.info.get("model", {}).get("dtype") or delta.info["method"].get("dtype")
    dtype = source.dtype or (
        named if isinstance(named, str) and named in DTYPES else max(set(floats), key=floats.count) if floats else None
    )
    recorded = delta.info["base"]
    return load_model(
        source.model,
        head,
        recorded["seed"] or 0,
        source.revision or _commit(recorded["revision"], recorded["id"], source.model),
        dtype,
        source.trust_remote_code,
        tokenizer,
        delta.info["method"].get("quantise"),
    )


def fitted(delta: Delta, loaded: LoadedModel) -> Delta:
    """The delta with a record of the whole tensors that no checkpoint holds, if it has no such record.

    The digest of all weights then counts a head that is gone, so it is left out.
    """
    base = delta.info["base"]
    told, found = {row["name"] for row in base["initialised"]}, inventory(loaded.model).find
    fresh = {found[name].name for name in map(canonical_name, loaded.initialised)}
    more = [
        {"name": d.name, "digest": d.base_digest}
        for d in delta.dense
        if d.name not in told and d.name in found and found[d.name].name in fresh
    ]
    if not more:
        return delta
    rows = sorted([*base["initialised"], *more], key=lambda row: row["name"])
    return Delta(delta.patches, delta.dense, {**delta.info, "base": {**base, "initialised": rows, "weights": None}})


def apply_to(delta: Delta, loaded: LoadedModel) -> None:
    """Applies a delta to its base. All weights are compared if the delta has their digest."""
    delta = fitted(delta, loaded)
    delta.apply(loaded.model, full=delta.info["base"]["weights"] is not None)


def ready(
    source: Source,
    delta: Delta | None,
    task: Task,
    max_length: int | None = None,
    seed: int = 6,
    look: Callable[[LoadedModel], None] | None = None,
) -> tuple[LoadedModel, int]:
    """The base with its delta on it, on the device that computes, and the number of tokens that an example may have.

    `look` is called with the base before anything is put on it.
    """
    if delta is None:
        loaded = load_model(source.model, task.head, seed, source.revision, source.dtype, source.trust_remote_code)
        task.fits(loaded.model)
    else:
        loaded = _bare_base(source, delta, task)
        task.fits(loaded.model)
        if look is not None:
            look(loaded)
        loaded = with_adapter_of(loaded, delta)
        with _of_known_task(delta):
            apply_to(delta, loaded)
        recorded = delta.info["method"].get("max_length")
        max_length = max_length or (recorded if isinstance(recorded, int) else None)
    taken = 0 if loaded.adapted is None else virtual_tokens(loaded.adapted.spec)
    length = longest(loaded.model, loaded.tokenizer, max_length, task.max_length, taken)
    loaded.model.to(device())
    return loaded, length


def evaluate_delta(
    source: Source,
    path: str | Path | None,
    task: Task,
    data: str | None = None,
    max_length: int | None = None,
    seed: int = 6,
    retain: str | None = None,
    eval_size: int | None = None,
) -> Evaluation:
    """The metric of a delta on a task: its base is loaded, its head drawn again, and the delta applied.

    Without a path the base itself is measured, with a head drawn from `seed`. The batches are those of training, so
    the value is that of the run to the last bit, on the same machine and versions. `eval_size`: at most so many
    rows, the same as in training. `retain`: a text on which the delta's model is compared with the base (`text_of`).
    Raises ConfigError if there is no delta to compare.
    """
    if retain is not None and path is None:
        raise ConfigError(f"retain={retain} compares a delta's model with the base, and there is no delta.")
    delta = None if path is None else st.load(path)  # before the data, so that a wrong path fails at once
    with plugins.blame(plugins.source_of(plugins.TASKS, task.name)):
        split = tasks.some_rows(task, tasks.load(task, "validation", data), eval_size)
    text = None if retain is None else text_of(retain, data)
    measured: list[tuple[HeldOut, float]] = []

    def look(base: LoadedModel) -> None:
        if text is not None:
            options = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
            held = held_out(*text, base, source.model, **options)
            measured.append((held, held.loss(base.model)))

    loaded, length = ready(source, delta, task, max_length, seed, look)
    found = evaluate(loaded.model, loaded.tokenizer, task, task.encode(loaded.tokenizer, split.examples, length))
    found = replace(found, delta=None if delta is None else delta.origin)
    for held, before in measured:
        found = replace(found, retention=held.retention(before, held.loss(loaded.model)))
    return found


def verify_delta(source: Source, path: str | Path, task: Task | None = None) -> Report:
    """Verifies that a model is the delta's base and that the delta changes no more than it says; see `Delta.verify`.

    All weights are compared if the delta has their digest (those of `selectune train` do), else those it writes.
    """
    delta = st.load(path)
    loaded = load_base(source, delta, task or task_of(delta), tokenizer=False)
    delta = fitted(delta, loaded)
    report = delta.verify(loaded.model, full=delta.info["base"]["weights"] is not None)
    if not report.base:
        task_of(delta)  # an unknown task is the better reason
    return report


def merge_delta(source: Source, path: str | Path, out: str | Path, task: Task | None = None) -> dict[str, Any]:
    """Writes base + delta as an ordinary model folder with its tokenizer. LoRA and its kin are folded into weights.

    The folder appears with all of its files or not at all. Raises ConfigError for a delta on an adapter that cannot be
    merged, and if `out` is anything but a new or empty folder.
    """
    _check_out(Path(out), source.model)
    with staged(out) as folder:
        delta = st.load(path)
        refuse_beside(delta, "merged into its base")
        mergeable(delta)
        loaded = load_base(source, delta, task or task_of(delta))
        refuse_quantised(delta, loaded)
        with _of_known_task(delta):
            fitted(delta, loaded).merge(loaded.model)
        if loaded.adapted is not None:
            loaded.adapted.merge()
        with quiet():
            loaded.model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
    return {"out": str(out), "model": source.model, "delta": delta.label, "scalars": delta.selected}


def refuse_quantised(delta: Delta, loaded: LoadedModel) -> None:
    """Raises DeltaError for a quantised base, which is no ordinary model folder, wherever the delta's values lie."""
    if quantised_weights(loaded.model):
        raise DeltaError(
            f"The base of {delta.label} is quantised, and its stored bits stay as they are, so nothing is merged "
            "into it. Keep the delta beside its base, or write plain floats: selectune export dequantised."
        )


def diff_models(base: Source, tuned: str, out: str | Path, seed: int = 6) -> tuple[Delta, Path]:
    """Saves the delta that turns one model folder into another. Tensors that the base lacks are drawn from `seed`."""
    after = load_model(tuned, None, seed, None, base.dtype, base.trust_remote_code)
    head = Head(type(after.model).__name__, int(after.model.config.num_labels))
    before = load_model(base.model, head, seed, base.revision, base.dtype, base.trust_remote_code)
    recorded = before.base(full=True)
    made = st.diff(before.model, after.model)
    info = {
        **made.info,
        "method": {**made.info["method"], "architecture": head.architecture, "num_labels": head.num_labels},
        "base": recorded,
    }
    delta = Delta(made.patches, made.dense, info)
    return delta, delta.save(out)


def _check_out(out: Path, model: str) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; a merged model is a folder, which is made if it is missing.")
    if out.is_dir() and Path(model).is_dir() and out.samefile(model):
        raise ConfigError(f"out={out} is the base's own folder, which would be overwritten; give another.")


def _head(delta: Delta) -> Head | None:
    """The class and outputs that a delta records: of its model, or (in older deltas) of two model folders."""
    model, method = delta.info.get("model"), delta.info["method"]
    if model is not None:
        labels = None if model["labels"] is None else tuple(model["labels"])
        return Head(model["architecture"], model["num_labels"], labels, model["problem_type"], model["pad_token_id"])
    architecture, outputs = method.get("architecture"), method.get("num_labels")
    return Head(architecture, outputs) if isinstance(architecture, str) and isinstance(outputs, int) else None


@contextmanager
def _of_known_task(delta: Delta) -> Iterator[None]:
    """Within it, BaseMismatchError becomes UnknownTaskError if the delta names a task that is not known here."""
    try:
        yield
    except BaseMismatchError:
        task_of(delta)
        raise


def _commit(revision: Any, recorded: Any, asked: str) -> str | None:
    """The recorded hub commit, if this model is the recorded one."""
    looks = isinstance(revision, str) and len(revision) == 40 and recorded == asked
    return revision if looks else None
