"""What a run will take, before it is run: peak memory, bytes of the delta, update counts. A config is enough."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from selectune.adapters import linears
from selectune.bench import methods, trace
from selectune.bench.workload import DTYPES, Bench, config_of, is_causal, prepare
from selectune.errors import ConfigError
from selectune.method import Method
from selectune.ops.cpu import DESKS
from selectune.schedule import resolve_budget
from selectune.scope import Scope
from selectune.types import Reads, Schedule

OPTIMIZERS = {"adamw": 8, "adam": 8, "sgd": 0, "momentum": 4}  # bytes of state for a trained scalar, fp32
_FLAT, _SLOT, _COORDINATES, _FREE = 8, 8, 16, 8  # int64 tables of the ledger, for a selected scalar
_WRITTEN = 4  # its value as the weight got it last
_PIECE, _SCORING = 1 << 18, 16  # scalars of a tensor scored at once, and bytes that each takes meanwhile
_PITCH, _BAND = 80, 768  # as in `ops.loops`, which is not imported for it: a turned column, columns of dy at once
_GAP, _HEADER, _ENTRY = 2, 700, 85  # of the delta's file: index of a scalar, what is said once, what of each tensor


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to take. Bytes, unless a name says otherwise."""

    method: str
    parameters: int
    trained: int  # scalars that may differ from the base in the end
    density: float
    steps: int | None
    updates: int | None  # gradients that scalars are given, summed over the steps
    weights: int
    saved: int  # alive when forward ends
    backward: int  # what backward needs besides
    gradient: int  # dense gradients alive at once: one tensor's on selecting steps, all in full fine-tuning
    values: int
    values_gradient: int
    optimizer: int
    ledger: int  # positions, slots, base values
    workspace: int
    peak: int  # all of the above
    above_model: int  # peak - weights, which `selectune bench` measures
    delta_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    bench: Bench, method: str, budget: int | float, steps: int | None = None, optimizer: str = "adamw"
) -> Prediction:
    """Predicts a run of `method` (`id3`, `id3:every=10`, `full`, `frozen`, ...) on a model's config.

    One step runs on shapes alone (`trace`), in about a second. The peak is that of tensors that are alive:
    the C library keeps freed blocks besides, which the resident set of a process on the CPU counts.

    Raises ModelError for a config that cannot be found, BudgetError, ConfigError for unknown names and for methods
    with a dense phase.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"--optimizer {optimizer}: unknown. Known: {', '.join(OPTIMIZERS)}.")
    methods.plannable(method)
    methods.check(method)
    if methods.parts(method)[1]:
        raise ConfigError(
            f"--method {method}: what sits on a model cannot be planned yet; leave out what follows the +."
        )
    config = config_of(bench.model)
    model = prepare(bench, config, "meta")
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    selective = methods.is_ours(method)
    chosen = methods.recipe(method, budget, steps or 1000) if selective else None
    if chosen is not None and chosen.dense is not None:
        raise ConfigError(
            f"--method {method}: its dense steps cannot be planned yet. `selectune methods` says what they take a "
            "weight, and attach logs it in bytes."
        )
    schedule, trained, tensors = _support(chosen, model, total, method)
    selects = chosen is not None and chosen.score is not None and chosen.score.reads is Reads.GRADIENT
    kind = trace.Kind(dense=selects, kept=method == methods.DENSE, frozen=method == methods.FLOOR)
    seen = trace.step(model, _batch(bench, config), bench, kind)
    quiet = trace.step(model, _batch(bench, config), bench, trace.Kind(dense=False)) if selects else seen
    itemsize = DTYPES[bench.dtype].itemsize
    state = OPTIMIZERS[optimizer]
    dense = kind.kept
    gradient = weights if dense else max(0, seen.peak - quiet.peak)
    values = 4 * trained if selective else 0
    moments = state * trained * itemsize // 4 if dense else state * trained if selective else 0
    ledger = (_FLAT + _SLOT + _COORDINATES + _FREE + _WRITTEN + itemsize) * trained if selective else 0
    layers = [layer.weight for layer in linears(model).values()]
    widest = max((weight.numel() for weight in layers), default=0)
    workspace = _turned(layers, bench) if selective and not _always_dense(chosen) else 0
    if selects:
        gradient = max(gradient, widest * DTYPES[bench.autocast or bench.dtype].itemsize)  # kept for the next tensor's
        workspace += min(_PIECE, widest) * _SCORING
    backward = (quiet if selects else seen).peak - seen.saved
    above = (quiet.peak + gradient if selects else seen.peak) + 2 * values + moments + ledger + workspace
    if dense:
        # gradients fill up while activations go; the optimizer's step finds all gradients and no activation, and
        # takes two temporaries of a tensor (of all tensors at once on CUDA, where it groups them)
        stepping = weights if bench.device == "cuda" else 2 * seen.largest_gradient
        above = max(seen.peak, weights + stepping) + moments
        gradient = min(gradient, max(0, above - moments - seen.saved))
        backward = max(0, above - moments - seen.saved - gradient)
    updates = None if not selective and not dense else _updates(schedule, trained, steps)
    return Prediction(
        method=method,
        parameters=total,
        trained=trained,
        density=trained / total,
        steps=steps,
        updates=updates,
        weights=weights,
        saved=seen.saved,
        backward=backward,
        gradient=gradient,
        values=values,
        values_gradient=values,
        optimizer=moments,
        ledger=ledger,
        workspace=workspace,
        peak=weights + above,
        above_model=above,
        delta_bytes=_file(trained, itemsize, tensors, total) if selective else weights if dense else 0,
    )


def _turned(layers: Sequence[torch.Tensor], bench: Bench) -> int:
    """Bytes in which the loops on the CPU hold tiles of the operands, tokens innermost: a desk for each thread."""
    if bench.device != "cpu":
        return 0
    widest = max((weight.shape[1] for weight in layers), default=0)
    workers = max(1, min(torch.get_num_threads(), DESKS // max(1, widest * _PITCH)))
    return 4 * workers * (widest + _BAND) * _PITCH


def _always_dense(chosen: Method | None) -> bool:
    """Whether every step forms dense gradients, so that none is sampled."""
    if chosen is None or chosen.score is None or chosen.score.reads is not Reads.GRADIENT:
        return False
    return getattr(chosen.schedule, "every", 0) == 1


def updates_of(schedule: Schedule, steps: int) -> int:
    """How many gradients scalars are given over a run: the support's size summed over its steps.

    A uniform increment of B over T steps comes to (T + 1) B / 2, a static mask to T B.

    >>> from selectune.schedule import Increment, OneShot
    >>> updates_of(Increment(12, 4), 4), updates_of(OneShot(12), 4), updates_of(Increment(10, 4), 4)
    (30, 48, 24)
    """
    return sum(schedule.target(step) for step in range(steps))


def _updates(schedule: Schedule | None, trained: int, steps: int | None) -> int | None:
    if steps is None:
        return None
    return trained * steps if schedule is None else updates_of(schedule, steps)


def _support(chosen: Method | None, model: nn.Module, total: int, method: str) -> tuple[Schedule | None, int, int]:
    """The schedule with its budget counted, the scalars trained in the end, and the tensors in scope."""
    if chosen is None:
        return None, total if method == methods.DENSE else 0, 0
    eligible, scoped, wholly = _counted(chosen.scope, model)
    if chosen.schedule is None:
        return None, wholly, scoped
    schedule = chosen.schedule.resolve(eligible)
    return schedule, resolve_budget(schedule.budget, eligible) + wholly, scoped


def _counted(scope: Scope, model: nn.Module) -> tuple[int, int, int]:
    """Scalars that may be selected, tensors they are in, and scalars trained wholly: as `Scope.find`, on shapes.

    `find` itself refuses tensors without memory, rightly.
    """
    names: dict[int, list[str]] = {}
    shapes: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[id(parameter)] = parameter
        names.setdefault(id(parameter), []).append(name)
    eligible = scoped = wholly = 0
    for key, aliases in names.items():
        size = shapes[key].numel()
        if _any(aliases, scope.train_fully):
            wholly += size
        elif _any(aliases, scope.include) and not _any(aliases, scope.exclude):
            owner = model.get_submodule(aliases[0].rpartition(".")[0])
            pads = isinstance(owner, nn.Embedding) and owner.padding_idx is not None and len(aliases) == 1
            eligible += size - (shapes[key].shape[1] if pads else 0)
            scoped += 1
    return eligible, scoped, wholly


def _any(names: list[str], wanted: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in wanted)


def _batch(bench: Bench, config: Any) -> dict[str, torch.Tensor]:
    shape = (bench.batch, bench.length)
    ids = torch.empty(shape, dtype=torch.int64, device="meta")
    labels = ids if is_causal(config) else torch.empty(shape[0], dtype=torch.int64, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _file(trained: int, itemsize: int, tensors: int, total: int) -> int:
    """Bytes of the delta: a value and a 16-bit gap a scalar, more where gaps are long, JSON for every tensor."""
    gap = total / max(trained, 1)
    words = 1 + gap / 65535
    return round(trained * (itemsize + _GAP * words)) + _HEADER + _ENTRY * min(tensors, trained)
