"""Sets up each method on a model: selectune's through `attach`, peers through their own packages, unchanged."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selectune import plugins
from selectune.adapters import KINDS, LINEARS, Spec, linears, make, parse, put_on, two_rates
from selectune.bench.workload import Bench, input_gradients
from selectune.errors import ConfigError, ModelError, did_you_mean
from selectune.method import Method
from selectune.models.adapted import parts, peer, spec_of
from selectune.recipes import RECIPES
from selectune.recipes.named import named, parameters
from selectune.runs.calibration import calibration
from selectune.runs.trainer import OPTIMIZERS
from selectune.schedule import resolve_budget
from selectune.train import Tuner, attach

LEARNING_RATE = 1e-4
FLOOR, DENSE = "frozen", "full"
EXAMPLES = 16  # single examples, or mini-batches, that a calibrated method gets


@dataclass(frozen=True)
class Conditions:
    """What a method is set up for: the number of scalars and steps, and data that it may read."""

    budget: int | float
    steps: int
    seed: int
    batches: list[dict[str, Tensor]]
    rate: float = LEARNING_RATE
    whole: tuple[str, ...] = ()  # tensors that no checkpoint held: a task's head, trained whole


@dataclass
class Ready:
    """A method that is set up: the optimizer over what it trains, and functions that say what it did."""

    optimizer: torch.optim.Optimizer | None
    selected: Callable[[], int]
    save: Callable[[Path], int]  # writes what would be shipped into a folder: bytes
    selecting: Callable[[], bool] = lambda: False  # whether the coming step selects
    undo: Callable[[], None] | None = None
    model: nn.Module | None = None  # in place of the one that was given
    tuner: Tuner | None = None
    after_step: Callable[[int], None] | None = None  # with the step's number, before gradients are dropped
    select_s: list[float] = field(default_factory=list)  # seconds of selections, where a peer's can be timed
    note: str = ""


def base_of(name: str) -> str:
    """The name alone, without options."""
    return name.partition("+")[0].partition(":")[0].strip()


def every_of(name: str) -> int:
    """The option `every` of a method: it selects at each step that this divides; 1 without the option."""
    every = named(parts(name)[0]).options.get("every", 1) if is_ours(name) else 1
    return every if isinstance(every, int) else 1


def is_ours(name: str) -> bool:
    """Whether a method is trained by selectune; `full` and `frozen` are plain torch."""
    return base_of(name) in RECIPES and base_of(name) != DENSE


def check(name: str) -> None:
    """Loads the plug-in that offers a method, if one does; raises ConfigError for a method that cannot be set up."""
    plugins.want_method(base_of(name))
    if is_ours(name):
        head, on = parts(name)
        named(head)
        if on:
            spec_of(head, on)
        return
    if peer(name) is None and name not in PEERS:
        known = [*PEERS, *KINDS, *(r for r in RECIPES if r != DENSE)]
        guess = did_you_mean(base_of(name).lower().replace("_", "-"), known)
        raise ConfigError(
            f"The method '{name}' is unknown. Known: {', '.join(known)}; id3:every=10 selects at every "
            f"10th step, id3+lora:r=8 selects from an adapter.{guess}"
        )


def needs(name: str) -> str | None:
    """The package and version that a peer comes from; None for selectune's. Raises ModelError if it is missing."""
    kind = KINDS.get((parts(name)[1] or name).partition(":")[0])
    package = "peft" if kind is not None and kind.peft else PEERS[name].package if name in PEERS else None
    if package is None:
        return None
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"The method {name} needs {package}, which is not installed: pip install 'selectune[bench]'."
        ) from error


def set_up(name: str, model: nn.Module, given: Conditions) -> Ready:
    """Sets up a method on a model; this is what is timed as its initialisation."""
    check(name)
    if is_ours(name):
        return ours(name, model, given)
    return PEERS[name].start(model, given) if name in PEERS else adapter(name, model, given)


def prepare(name: str, model: nn.Module, batch: dict[str, Tensor], bench: Bench) -> None:
    """Does what a peer needs once on a model before its set-up; it is not timed."""
    if name in PEERS and (first := PEERS[name].prepare) is not None:
        first(model, batch, bench)


def recipe(name: str, budget: int | float, steps: int, whole: tuple[str, ...] = ()) -> Method:
    """The method of `id3:every=10`. The number of examples is chosen here unless the options say it."""
    chosen = named(parts(name)[0])
    takes, known = inspect.signature(chosen.recipe.function).parameters, parameters(chosen.recipe)
    read = ("examples", "batches") if chosen.name != "static-d3" else ()  # which reads the first step's, unless asked
    offered: dict[str, Any] = {option: EXAMPLES for option in read if option in known}
    if whole and "train_fully" in takes:
        offered["train_fully"] = whole
    if "temperature" in known and "score" not in known:
        offered["temperature"] = 1.0  # the model's own loss, whatever its outputs are
    return chosen.make(budget if "budget" in takes else None, steps, **offered)


def ours(name: str, model: nn.Module, given: Conditions) -> Ready:
    method, on = recipe(name, given.budget, given.steps, given.whole), parts(name)[1]
    freeze = not RECIPES[base_of(name)].beside
    adapted = put_on(model, placed(on), given.seed, freeze=freeze) if on else None
    model = adapted.model if adapted else model
    rows = [row for batch in given.batches for row in rows_of(batch)]
    length, batch = rows[0]["input_ids"].shape, len(given.batches[0]["input_ids"])
    rows = [row for row in rows if row["input_ids"].shape == length]  # real batches are padded to their longest row
    rows = [rows[i % len(rows)] for i in range(EXAMPLES * batch)]
    read = calibration(model, method.score, rows, stacked, batch, given.seed)
    tuner = attach(model, method, seed=given.seed, **read)

    def undo() -> None:
        tuner.detach()
        if adapted is not None:
            adapted.remove()

    groups = [{"params": tuner.parameters(), "lr": given.rate}]
    return Ready(
        optimizer=OPTIMIZERS[RECIPES[base_of(name)].optimizer](groups, 0.0) or _adamw(tuner.parameters(), given.rate),
        selected=lambda: tuner.selected,
        save=lambda folder: tuner.save(folder / "delta.safetensors", order=False).stat().st_size,
        selecting=lambda: tuner.quota > 0,
        undo=undo,
        model=model,
        tuner=tuner,
    )


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The examples of a batch."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]


def stacked(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The batch of some examples."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def full(model: nn.Module, given: Conditions) -> Ready:
    """Plain full fine-tuning: AdamW over everything."""
    del given
    total = sum(p.numel() for p in model.parameters())
    return Ready(_adamw(model.parameters()), lambda: total, lambda folder: sum(p.nbytes for p in model.parameters()))


def frozen(model: nn.Module, given: Conditions) -> Ready:
    """Nothing is trained, and the gradient runs back to the embeddings' output: the least that a step can cost."""
    del given
    input_gradients(model)
    return Ready(None, lambda: 0, lambda folder: 0, note="forward and input gradients only")


def adapter(name: str, model: nn.Module, given: Conditions) -> Ready:
    """An adapter trained wholly by AdamW: LoRA and its kin as peft has them, bottlenecks of selectune."""
    needs(name)
    adapted = put_on(model, _spec(name, model, given.budget), given.seed, steps=given.steps, record=False)
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    ratio = adapted.spec.options.get("ratio")
    optimizer = _adamw(trained) if ratio is None else two_rates(adapted.model, LEARNING_RATE, float(ratio), 0.0)
    return Ready(
        optimizer=optimizer,
        selected=lambda: sum(p.numel() for p in trained),
        save=adapted.save,
        undo=adapted.remove,
        model=adapted.model,
        after_step=adapted.after_step,
    )


def placed(name: str) -> Spec:
    """The adapter of a name, on random tokens: no tokenizer says which of them are special, so the first two are."""
    given = parse(name)
    return make(given.kind, {**given.options, "ids": "0+1"}) if given.options.get("ids") == "auto" else given


def _spec(name: str, model: nn.Module, budget: int | float) -> Spec:
    """The adapter of a name. Without options it sits on every linear layer, sized by the budget if its kind allows."""
    given = placed(name)
    if ":" in name or "targets" not in given.options:
        return given
    layers = list(linears(model).values())
    count = resolve_budget(budget, sum(p.numel() for p in model.parameters()))
    options: dict[str, Any] = {"targets": LINEARS}
    if given.kind == "super":
        options["sparsity"] = max(0.0, 1 - count / sum(layer.weight.numel() for layer in layers))
    if given.kind == "shira":
        options["r"] = max(1, round(count / sum(sum(layer.weight.shape) for layer in layers)))
    return make(given.kind, options)


@dataclass(frozen=True)
class Peer:
    """A method that is not selectune's: how it is set up, and which package it needs."""

    start: Callable[[nn.Module, Conditions], Ready]
    package: str | None = None
    prepare: Callable[[nn.Module, dict[str, Tensor], Bench], None] | None = None  # once a model, before its set-up
    dense: bool = True  # whether it keeps optimizer state of every weight


PEERS = {DENSE: Peer(full), FLOOR: Peer(frozen, dense=False)}


def join(path: str | None) -> None:
    """Adds peers from a Python file that defines PEERS, as benchmarks/peers.py does.

    Raises ConfigError where the file cannot be read or has none.
    """
    if path is None:
        return
    try:
        PEERS.update(runpy.run_path(path)["PEERS"])
    except (OSError, KeyError) as error:
        raise ConfigError(
            f"{path}: no Python file that defines PEERS, a dict of selectune.bench.methods.Peer."
        ) from error


def _adamw(parameters: Any, rate: float = LEARNING_RATE) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=rate, weight_decay=0.0)
