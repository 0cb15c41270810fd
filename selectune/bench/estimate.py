"""Predicts what a run takes before it is run: peak memory, bytes of the delta, update counts. A config is enough."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from selectune.adapters import linears, put_on
from selectune.bench import methods
from selectune.bench.trace import Storages, faked, known, size, trace
from selectune.bench.workload import DTYPES, Bench, batches, config_of, file_of, prepare
from selectune.bits import wide
from selectune.errors import ConfigError, ModelError, SelectuneError
from selectune.integrations.quantise import QUANTISED, bytes_saved
from selectune.method import Method
from selectune.models.adapted import parts, peer, virtual_tokens
from selectune.ops import bounds
from selectune.ops.cpu.kernels import DESKS
from selectune.recipes import RECIPES
from selectune.runs.calibration import calibration as data_of
from selectune.schedule import resolve_budget
from selectune.scope import Found, Scope
from selectune.train.choose import shares
from selectune.train.choose.calibrate import calibrate
from selectune.train.choose.products import largest
from selectune.train.choose.scan import PIECE
from selectune.types import DropAndGrow, Phased, Reads, Schedule

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
}
_PIECE, _SCORING = 1 << 18, 16  # scalars of a tensor scored at once, and bytes that each takes meanwhile
_RANKING = 52  # bytes that each scalar takes while nothing is known of the others (`choose.scan`)
_GAP, _HEADER, _ENTRY = 2, 700, 85  # of the delta's file: index of a scalar, what is said once, what of each tensor


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to take; all sizes are bytes."""

    method: str
    parameters: int
    trained: int  # scalars that may differ from the base in the end
    density: float
    steps: int | None
    updates: int | None  # gradients that scalars are given, summed over the steps
    weights: int
    adapter: int  # the weights of an adapter
    saved: int  # alive when forward ends
    backward: int  # what backward and the optimizer's step need in addition
    gradient: int  # dense gradients alive at once: one tensor's on selecting steps, all in full fine-tuning
    values: int  # the offsets
    latents: int  # what a dense phase trains in place of weights
    optimizer: int
    ledger: int  # positions, slots, and copies of base values
    workspace: int
    calibration: int  # beside the weights, while the score is read from data; in place of saved to workspace
    ranks: int  # processes that train together; the sizes are those of each
    exchange: int  # what their collectives hold: the bucket of the reduced gradients, and the mean of a dense one
    sent: int  # by each process, in a step that selects nothing
    sent_selecting: int  # by each process, in a step that selects by its gradient
    peak: int  # the weights, and the larger of training and calibration
    above_model: int  # peak - weights, which `selectune bench` measures
    delta_bytes: int


def plan(
    bench: Bench,
    method: str,
    budget: int | float | str,
    steps: int | None = None,
    optimizer: str = "adamw",
    on: str | None = None,
    ranks: int = 1,
    quantise: str | None = None,
) -> Prediction:
    """Predicts a run of `method` (`id3:every=10`, `lora:r=8`, `full`, `frozen`, ...) on a model's config.

    `budget`: a count, a share, or an adapter that has as many scalars (`lora:r=2`). `on`: an adapter that the method
    selects from. Steps run on shapes alone (`trace`), in a few seconds. The peak is that of tensors that are alive:
    the C library keeps freed blocks as well, which the resident set of a process on the CPU counts.

    A method with a dense phase is predicted in that phase, where its memory is largest.

    `ranks`: processes under DistributedDataParallel. Each sends 2 (n - 1)/n times the bytes of what is averaged, as
    a ring does (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"): the
    gradients of what is trained. In a selecting step it sends half as many of the dense gradient of every tensor in
    scope, or all of a small one: at most, as a few entries of most tensors do on real gradients (docs/scale.md).

    `quantise`: `int8`, `nf4` or `gguf`, the form that the base is kept in. A step dequantises one weight at a time.

    Raises ModelError for a config that cannot be found and for a model that cannot run without data, BudgetError,
    ConfigError for unknown names, for SHiRA, whose mask is made of numbers, and for what one process must train.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: expected at least 1 process.")
    if quantise not in (None, *QUANTISED):
        raise ConfigError(f"--quantise {quantise}: unknown. Known: {', '.join(QUANTISED)}.")
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"--optimizer {optimizer}: unknown. Known: {', '.join(OPTIMIZERS)}.")
    name = method if on is None else f"{method}+{on}"
    methods.check(name)
    config = config_of(bench.model)
    try:
        model = prepare(bench, config, "meta")
        total = sum(p.numel() for p in model.parameters())
        count = _size_of(model, budget) if isinstance(budget, str) else budget
        base = size(model.parameters())
        saved = 0 if quantise is None else bytes_saved(model, quantise, file_of(bench.model))
        model = _adapted(model, name, steps)
        bench = _fitting(bench, config, name)
        with faked(model):
            chosen, found = _method(model, name, count, steps or 1000)
            told = _predicted(bench, config, model, total, base, name, chosen, found, steps, optimizer, ranks)
            return told if quantise is None else _quantised(told, model, saved)
    except SelectuneError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(
            f"A step of {bench.model} cannot be run on shapes alone, so it cannot be planned: {type(error).__name__}: "
            f"{said}. `selectune bench` measures a step."
        ) from error


def _predicted(
    bench: Bench, config: Any, model: nn.Module, total: int, weights: int, name: str, chosen: Method | None,
    found: Found, steps: int | None, optimizer: str, ranks: int,
) -> Prediction:  # fmt: skip
    if ranks > 1 and chosen is not None and chosen.dense is not None:
        raise ConfigError(
            f"--ranks {ranks}: {name} trains every entry for a while, which one process does. Leave it out."
        )
    schedule = None if chosen is None else chosen.resolve(found)
    count = 0 if schedule is None else resolve_budget(schedule.budget, found.eligible)
    wholly = sum(t.parameter.numel() for t in found.whole)
    dense = None if chosen is None else chosen.dense
    every = 0 if dense is None else sum(t.parameter.numel() for t in found.tensors)  # trained at a dense step
    trained = count + wholly + (every if schedule is None else 0)
    selects = chosen is not None and chosen.score is not None and chosen.score.reads is Reads.GRADIENT
    stepping = functools.partial(OPTIMIZERS[optimizer], lr=1e-4, foreach=bench.device == "cuda")
    step = functools.partial(
        trace, model, batches(replace(bench, device="cpu"), config, 1)[0], bench, found, count, stepping,
        watches=isinstance(schedule, DropAndGrow) and schedule.window > 0,
        copies=chosen is not None and chosen.fill == "zero", method=chosen,
    )  # fmt: skip
    quiet = step()
    peak = max(quiet.peak, step(selects=True).peak) if selects else quiet.peak
    if isinstance(schedule, Phased):  # the end of the phase: changes are ranked while all gradients are there
        peak = max(peak, quiet.kept + quiet.gradients + _ranking(found))
    widest = max((layer.weight.numel() for layer in linears(model).values()), default=0)
    always = dense is not None or (selects and getattr(schedule, "every", 0) == 1)  # every gradient is dense
    sampled = count > 0 and not always
    workspace = _turned(model, bench) if sampled else 0
    if selects and chosen is not None:
        workspace += min(_PIECE, widest) * _SCORING
        workspace += (
            _rounded(model, bench, chosen, _quota(schedule, steps or 1000), found.eligible) if ranks == 1 else 0
        )
    reduced = quiet.values + size(t.parameter for t in found.whole)
    mean, means = _shared(found, _quota(schedule, steps or 1000), ranks) if selects and ranks > 1 else (0, 0)
    room = quiet.peak - quiet.saved - quiet.kept
    gradient = min(room, quiet.gradients)
    itemsize = DTYPES[bench.dtype].itemsize
    adapter = size(model.parameters()) - weights
    shipped = _file(trained, itemsize, len(found.tensors), total) if trained else 0
    if schedule is not None and schedule.keeps and schedule.steps and not isinstance(schedule, DropAndGrow | Phased):
        shipped += count * ((steps or schedule.steps) - 1).bit_length() // 8  # the step of each scalar
    if methods.base_of(name) == methods.DENSE or (schedule is None and dense is not None):
        shipped = size(t.parameter for t in (*found.whole, *found.tensors))
    calibration = _calibration(model, bench, config, chosen, found)
    again = calibration and schedule is not None and not schedule.keeps  # during the run, beside what it holds then
    exchange = reduced + mean if ranks > 1 else 0
    above = adapter + max(peak + workspace + exchange, calibration + (quiet.kept if again else 0))
    return Prediction(
        method=name,
        parameters=total,
        trained=trained,
        density=trained / total,
        steps=steps,
        updates=None if steps is None or not trained else wholly * steps + updates_of(schedule, steps, every),
        weights=weights,
        adapter=adapter,
        saved=quiet.saved,
        backward=room - gradient,
        gradient=gradient + peak - quiet.peak,
        values=quiet.values,
        latents=quiet.latents,
        optimizer=quiet.state,
        ledger=quiet.kept - quiet.values - quiet.state - quiet.latents,
        workspace=workspace,
        calibration=calibration,
        ranks=ranks,
        exchange=exchange,
        sent=_ring(reduced, ranks),
        sent_selecting=_ring(reduced, ranks) + means,
        peak=weights + above,
        above_model=above,
        delta_bytes=shipped,
    )


def _quantised(told: Prediction, model: nn.Module, saved: int) -> Prediction:
    """With so many bytes less of weights, and room for the largest one in full, as layers and scores need it."""
    room = max((layer.weight.nbytes for layer in linears(model).values()), default=0)
    return replace(
        told, weights=told.weights - saved, workspace=told.workspace + room, peak=told.peak + room - saved,
        above_model=told.above_model + room,
    )  # fmt: skip


def _size_of(model: nn.Module, adapter: str) -> int:
    """How many scalars an adapter has on this model."""
    adapted = put_on(model, methods.placed(adapter), record=False)
    size = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    adapted.remove()
    return size


def _adapted(model: nn.Module, name: str, steps: int | None) -> nn.Module:
    """The model with the adapter that the method's name says, if any."""
    adapter = parts(name)[1]
    if name in (methods.FLOOR, methods.DENSE) or (methods.is_ours(name) and not adapter):
        return model
    if methods.base_of(adapter or name) == "shira":
        raise ConfigError(
            f"--method {name}: peft makes the mask of SHiRA out of numbers, and a plan has none. It trains r (m + n) "
            "scalars of each matrix (m, n); `selectune bench` measures it."
        )
    freeze = not (methods.is_ours(name) and RECIPES[methods.base_of(name)].beside)
    spec = methods.placed(adapter or name)
    return put_on(model, spec, record=False, steps=None if adapter else steps, freeze=freeze).model


def _fitting(bench: Bench, config: Any, name: str) -> Bench:
    """The bench with examples so short that an adapter's virtual tokens fit in as well."""
    limit = getattr(config, "max_position_embeddings", None)
    taken = virtual_tokens(peer(parts(name)[1] or name))
    return replace(bench, length=max(1, min(bench.length, limit - taken))) if taken and limit else bench


def _method(model: nn.Module, name: str, budget: int | float, steps: int) -> tuple[Method | None, Found]:
    """The method if it is a selective one, and what is trained."""
    if name == methods.FLOOR:
        return None, Found((), ())
    if not methods.is_ours(name):
        return None, Scope(include=(), train_fully=("*",)).find(model, loaded=False)
    chosen = methods.recipe(name, budget, steps)
    return chosen, chosen.scope.find(model, loaded=False)


def _rounded(model: nn.Module, bench: Bench, method: Method, quota: int, entries: int) -> int:
    """Bytes of exact selection (`choose.products`): both operands as int8, and the entries that bounds leave."""
    bounded = method.score is not None and method.score.weighting is not None
    if not (bounded and 0 < quota <= largest(entries) and bench.device == "cpu" and bench.dtype == "fp32"):
        return 0
    tokens = bench.batch * bench.length
    shapes = [tuple(layer.weight.shape) for layer in linears(model).values()]
    shapes = [(o, i) for o, i in shapes if bounds.pays(tokens, o, i, unknown=False)]
    left, right = (max((shape[side] for shape in shapes), default=0) for side in (0, 1))
    return tokens * (left + right) + 16 * int(bounds.SHARE * max((o * i for o, i in shapes), default=0))


def _quota(schedule: Schedule | None, steps: int) -> int:
    """The most entries that one step selects."""
    if schedule is None:
        return 0
    return max(schedule.target(t) - (schedule.target(t - 1) if t else 0) for t in range(max(1, steps)))


def _shared(found: Found, quota: int, ranks: int) -> tuple[int, int]:
    """Bytes of mean gradients over the ranks (`choose.shares`): held at once, and sent in a selecting step at most."""
    held = sent = 0
    for parameter in (tensor.parameter for tensor in found.tensors):
        entries, dtype = parameter.numel(), wide(parameter.dtype)
        parted = entries >= shares.SMALL and quota <= entries // shares.FEW // ranks
        copied = not parted or entries % ranks > 0 or parameter.dtype != dtype
        whole = entries * dtype.itemsize
        held = max(held, copied * whole + parted * whole // ranks)
        sent += _ring(whole, ranks) // (1 + parted)
    return held, sent


def _calibration(model: nn.Module, bench: Bench, config: Any, method: Method | None, found: Found) -> int:
    """Bytes above the weights while a score is read from data. One example, or mini-batch, stands for all."""
    if method is None or method.score is None or not method.score.reads.calibrated:
        return 0
    counts = ("examples", "batches", "hardest")
    score = method.score
    score = replace(score, parameters={**score.parameters, **{k: 1 for k in counts if score.parameters.get(k)}})
    batch = batches(replace(bench, device="cpu"), config, 1)[0]
    read = data_of(model, score, methods.rows_of(batch), methods.stacked, bench.batch, bench.seed)
    with Storages(known(model, batch)) as storages:
        calibrate(model, score, found.tensors, read["calibration"], read["loss"])
    sums = sum(t.parameter.numel() * wide(t.parameter.dtype).itemsize for t in found.tensors)
    return max(storages.peak, sums + _ranking(found))


def _ranking(found: Found) -> int:
    """Bytes in which the first scores of a selection are ranked that does not go by a gradient."""
    return _RANKING * min(PIECE, max(t.parameter.numel() for t in found.tensors))


def _turned(model: nn.Module, bench: Bench) -> int:
    """Bytes in which each thread's loop on the CPU holds turned tiles of the operands (`ops.cpu`)."""
    from selectune.ops.cpu.loops import BAND, PITCH

    if bench.device != "cpu":
        return 0
    widest = max((layer.weight.shape[1] for layer in linears(model).values()), default=0)
    workers = max(1, min(torch.get_num_threads(), DESKS // max(1, widest * PITCH)))
    return 4 * workers * (widest + BAND) * PITCH


def _ring(size: int, ranks: int) -> int:
    """Bytes that each of n processes sends to average so many: 2 (n - 1)/n times as many."""
    return 2 * (ranks - 1) * size // ranks


def updates_of(schedule: Schedule | None, steps: int, dense: int = 0) -> int:
    """How many gradients the scalars get over a run: the support's size, summed over the steps.

    A uniform increment of B over T steps comes to (T + 1) B / 2, a static mask to T B. At dense steps it is `dense`.

    >>> from selectune.schedule import Increment, OneShot
    >>> updates_of(Increment(12, 4), 4), updates_of(OneShot(12), 4), updates_of(Increment(10, 4), 4)
    (30, 48, 24)
    """
    if schedule is None:
        return steps * dense
    sparse = [step for step in range(steps) if not (isinstance(schedule, Phased) and schedule.dense(step))]
    return sum(map(schedule.target, sparse)) + dense * (steps - len(sparse))


def _file(trained: int, itemsize: int, tensors: int, total: int) -> int:
    """Bytes of the delta: a value and a 16-bit gap for each scalar, more for long gaps, and JSON for each tensor."""
    gap = total / max(trained, 1)
    words = 1 + gap / 65535
    return round(trained * (itemsize + _GAP * words)) + _HEADER + _ENTRY * min(tensors, trained)
