"""A row of the zoo, and what becomes of it: equal to the oracle, refused with a sentence, or impossible for torch.

Every row is trained twice from the same weights on the same batches: by the oracle (`zoo_oracle`) and by selectune.
Float64 rows must have the same support after every step, the same gradient at it, the same weights at the end; a
bfloat16 row the same first selection and gradient up to rounding. All of them: `verify` passes, and after `detach`
the base is there again, bit for bit.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from zoo_oracle import RATE, SELECTING, STEPS, Line, Losses, Run, Step, dense_gradient, dense_run, in_scope, line_of

import selectune as st
from selectune.errors import SelectuneError

Call = Callable[..., Any]
Loss = Callable[[nn.Module, Any, Call], Tensor]  # (model, batch, run): run(function, *arguments), checkpointed perhaps

# "whole": the budget is nearly all there is, so that small gradients are compared too, in every tensor
SETTINGS = ("plain", "accumulated", "whole", "reentrant", "nonreentrant", "bf16", "attention")
SHORT = os.environ.get("ZOO") != "all"  # the form that `make test` runs; `make test-zoo` runs everything
EQUAL, REFUSED, IMPOSSIBLE, ENDLESS = "equal", "refused", "impossible", "endless"
TIE = 1e-9  # scores closer than this, relatively, are a tie that rounding may decide
NOISE = 1e-12  # scores below this share of the largest are rounding, or 0


@dataclass(frozen=True)
class Expected:
    """The outcome of a row that is not equal: REFUSED or IMPOSSIBLE, and words that the reason contains."""

    kind: str
    words: str


def refused(words: str) -> Expected:
    return Expected(REFUSED, words)


def impossible(words: str) -> Expected:  # plain autograd, without a tuner, does not do it either
    return Expected(IMPOSSIBLE, words)


def raised(words: str) -> Expected:  # torch says it in words of its own
    return Expected("raised", words)


def endless(why: str) -> Expected:  # plain autograd never comes back, so this is not run; the summary names it
    return Expected(ENDLESS, why)


@dataclass(frozen=True)
class Outcome:
    kind: str
    why: str = ""


class DoesNotApplyError(Exception):
    """The model has no such setting, by its own word."""


@dataclass(frozen=True)
class Row:
    """`make` gives a float64 model, `batch` what `loss` is computed from; `part` names a submodule to attach to."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    loss: Loss
    expects: Mapping[str, Expected] = field(default_factory=dict)
    short: bool = False  # in the short form too
    part: str = ""
    enter: Callable[[nn.Module, str], Call] | None = None  # puts a setting on a model; default: by `run`
    tie: float = TIE
    share: float = 0.1  # of the scalars in scope: the budget, but for the settings that take all of them

    def __str__(self) -> str:
        return self.name


@dataclass
class Prepared:
    """One copy of a row's model in a setting, with its losses."""

    model: nn.Module
    part: nn.Module
    losses: Losses
    micros: int


def run_plainly(function: Call, *arguments: Any) -> Any:
    return function(*arguments)


def by_checkpoint(reentrant: bool) -> Call:
    def run(function: Call, *arguments: Any) -> Any:
        return checkpoint(function, *arguments, use_reentrant=reentrant)

    return run


def module_setting(model: nn.Module, setting: str) -> Call:
    """Settings of a plain module: checkpointing is the caller's, around the call."""
    del model
    return by_checkpoint(setting == "reentrant") if setting in ("reentrant", "nonreentrant") else run_plainly


def prepare(row: Row, setting: str) -> Prepared:
    torch.manual_seed(0)
    model = row.make()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at an initial 0 or 1, where gradients vanish or tie
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(torch.bfloat16 if setting == "bf16" else torch.float64)
    model.train()
    run = (row.enter or module_setting)(model, setting)

    def losses(step: int, micro: int) -> Tensor:
        number = step * 10 + micro
        batch = row.batch(torch.Generator().manual_seed(number))
        if setting == "bf16":
            batch = pytree.tree_map_only(Tensor, _narrow, batch)
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        return row.loss(model, batch, run)

    return Prepared(model, model.get_submodule(row.part), losses, 2 if setting == "accumulated" else 1)


def _narrow(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(torch.bfloat16).requires_grad_(tensor.requires_grad)


def budget_of(row: Row, setting: str) -> int:
    """A share of the scalars in scope; "whole": nine tenths of those that have a gradient at the first step."""
    made = prepare(row, setting)
    if setting != "whole":
        return max(SELECTING, int(row.share * sum(p.numel() for p in in_scope(made.part).values())))
    sizes = dense_gradient(made.part, made.losses, 0, made.micros)[1].abs()
    return max(SELECTING, int(0.9 * int((sizes > NOISE * sizes.max()).sum())))


def alike(setting: str) -> str:
    """The setting whose dense run is this one's: checkpointing changes no gradient."""
    return "whole" if setting in ("reentrant", "nonreentrant") else setting


_oracles: dict[tuple[str, str], Run] = {}


def oracle(row: Row, setting: str) -> Run:
    """The dense run of a row."""
    plain = alike(setting)
    if (row.name, plain) not in _oracles:
        made = prepare(row, plain)
        steps = 1 if setting == "bf16" else STEPS
        run = dense_run(made.part, made.losses, budget_of(row, plain), made.micros, steps)
        finite = all(bool(s.gradient.isfinite().all()) for s in run.steps) and bool(run.weights.isfinite().all())
        assert finite, "the dense run is not finite, so it shows nothing"
        assert len(run.steps[0].support), "the dense run has no gradient, so it shows nothing"
        _oracles[row.name, plain] = run
    return _oracles[row.name, plain]


def engine(row: Row, setting: str, budget: int, steps: int = STEPS) -> tuple[Run, str]:
    """The same by selectune, and what was wrong after detach ("" if nothing)."""
    made = prepare(row, setting)
    line, before, flags = Line.of(made.part), _bits(made.part), _flags(made.model)
    base = line_of(list(in_scope(made.part).values()))
    method = st.id3(budget=budget, steps=SELECTING)
    tuner = st.attach(made.part, method, accumulation_steps=made.micros)
    try:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=RATE)
        done = []
        for step in range(steps):
            total = 0.0
            for micro in range(made.micros):
                loss = made.losses(step, micro) / made.micros
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            gradient = tuner.parameters()[0].grad
            assert gradient is not None, "the tuner's vector has no gradient"
            done.append(Step(total, line.positions(tuner.support), gradient.detach().clone()))
            optimizer.zero_grad()
        assert tuner.step == steps, f"the tuner counted {tuner.step} steps of {steps}"
        tuner.verify()
        now = dict(made.part.named_parameters())
        weights = line_of([now[name] for name in line.names])
        moved = torch.ones(line.size, dtype=torch.bool)
        moved[done[-1].support] = False
        assert bool((weights[moved] == base[moved]).all()), "an unselected weight moved"
        slots = _slots(tuner, line)
        for step in done:
            step.gradient = step.gradient[slots[step.support]]
    finally:
        tuner.detach()
    wrong = "" if _bits(made.part) == before else "after detach the model is not the base again"
    wrong = wrong or ("" if _flags(made.model) == flags else "after detach other parameters are trainable than before")
    return Run(done, weights, budget), wrong


def _slots(tuner: st.Tuner, line: Line) -> Tensor:
    """Where each position's value lies in the tuner's vector: in the order of selection, which the delta tells."""
    start = dict(zip(line.names, line.starts, strict=True))
    slots = torch.zeros(line.size, dtype=torch.int64)
    patches = tuner.delta(order=True, allow_empty=True).patches  # their names leave out what wrappers add
    for name, patch in zip(tuner.support, patches, strict=True):
        assert patch.order is not None
        slots[patch.indices.long() + start[name]] = patch.order.long()
    return slots


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {n: p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if p.numel() else b""
            for n, p in in_scope(model).items()}  # fmt: skip


def _flags(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters()}


# -- the comparison


def difference(row: Row, setting: str, ours: Run, dense: Run, line: Line) -> str:
    """In words, the first thing that differs; "" if nothing does."""
    narrow = setting == "bf16"
    excused = torch.zeros(0, dtype=torch.int64)  # selected by one side alone, of scores that are rounding
    for number, (mine, true) in enumerate(zip(ours.steps, dense.steps, strict=False)):
        where = f"step {number}: "
        if abs(mine.loss - true.loss) > (0.02 if narrow else 1e-6) * max(1.0, abs(true.loss)):
            return f"{where}the loss is {mine.loss}, should be {true.loss}"
        apart = _apart(mine.support, true.support)
        apart = apart[~torch.isin(apart, excused)]
        if len(apart):
            assert true.scores is not None
            gap = (true.scores[apart] - true.cutoff).abs() / max(true.cutoff, 1e-300)
            noise = true.scores[apart] < NOISE * true.scores.max()
            excused = torch.cat([excused, apart])
            if not bool(noise.all()) and float(gap[~noise].max()) > (0.05 if narrow else row.tie):
                missing, extra = (line.counts(apart[torch.isin(apart, side)]) for side in (true.support, mine.support))
                return f"{where}the support differs: missing {missing}, too many {extra}"
            if not narrow and not bool(noise.all()):
                return ""  # a tie that rounding decided: from here on the runs are two, and both right
        common = torch.isin(mine.support, true.support), torch.isin(true.support, mine.support)
        a, b = mine.gradient[common[0]].double(), true.gradient[common[1]].double()
        if narrow:
            off = float((a - b).norm() / b.norm())
            if off > 0.02:
                return f"{where}the gradient is {off:.1%} off"
            return ""
        bad = (a - b).abs() > 1e-6 * b.abs() + 1e-9 * b.abs().max()
        if bool(bad.any()):
            tensors = line.counts(mine.support[common[0]][bad])
            return f"{where}the gradient at the support differs: {tensors}, by {float((a - b).abs().max()):.2g}"
    if not narrow and not torch.allclose(ours.weights, dense.weights, rtol=1e-6, atol=1e-8):
        return "the weights at the end differ"
    return ""


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[~torch.isin(a, b)], b[~torch.isin(b, a)]])


@contextmanager
def quietly():
    """Hides the warnings of libraries about tiny configurations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outcome(row: Row, setting: str) -> Outcome:
    """Runs a row in a setting: EQUAL, REFUSED, IMPOSSIBLE, or "raised", "wrong"."""
    wanted = row.expects.get(setting)
    if wanted is not None and wanted.kind == ENDLESS:
        return Outcome(ENDLESS, wanted.words)
    with quietly():
        try:
            dense = oracle(row, setting)
        except DoesNotApplyError as no:
            return Outcome("without", str(no))
        except Exception as error:  # noqa: BLE001 - without an oracle the row says nothing, or that there is none
            return Outcome(IMPOSSIBLE, f"{type(error).__name__}: {error}")
        if wanted is not None and wanted.kind == IMPOSSIBLE:
            return _control(row, setting, dense) or Outcome("possible", "without a tuner there is nothing wrong")
        try:
            ours, after = engine(row, setting, dense.budget)
        except DoesNotApplyError as no:
            return Outcome("without", str(no))
        except SelectuneError as error:
            return Outcome(REFUSED, str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the row's outcome
            found = Outcome("raised", f"{type(error).__name__}: {error}")
        else:
            line = Line.of(prepare(row, setting).part)
            differs = difference(row, setting, ours, dense, line) or after
            if not differs:
                return Outcome(EQUAL)
            found = Outcome("wrong", differs)
        return _control(row, setting, dense) or _named(row, setting, dense.budget) or found


def _named(row: Row, setting: str, budget: int) -> Outcome | None:
    made = prepare(row, setting)  # what `Tuner.check` says of a row before its first step and after it
    tuner = st.attach(made.part, st.id3(budget=budget, steps=SELECTING), accumulation_steps=made.micros)
    try:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=RATE)
        for step in range(2):
            tuner.check(None, lambda model, batch, step=step: made.losses(step, 0))
            for micro in range(made.micros):
                made.losses(step, micro).backward()
            optimizer.step()
            optimizer.zero_grad()
    except SelectuneError as error:
        return Outcome(REFUSED, str(error))
    except Exception:  # noqa: BLE001 - then the row's own outcome stands
        return None
    finally:
        tuner.detach()
    return None


def _control(row: Row, setting: str, dense: Run) -> Outcome | None:
    if setting not in ("reentrant", "nonreentrant"):  # whether plain autograd fails in this setting too
        return None
    made = prepare(row, setting)
    try:
        _, gradient = dense_gradient(made.part, made.losses, 0, made.micros)
    except Exception as error:  # noqa: BLE001 - as above
        return Outcome(IMPOSSIBLE, f"{type(error).__name__}: {error}")
    at = gradient[dense.steps[0].support]
    if not torch.allclose(at, dense.steps[0].gradient, rtol=1e-6, atol=1e-9):
        return Outcome(IMPOSSIBLE, "without a tuner, too, the gradient is not that of the plain run")
    return None


def cases(rows: Sequence[Row], short: Sequence[str]) -> list[Any]:
    """Rows and settings to test, in the short form (in the settings `short`) or in full."""
    settings = [s for s in SETTINGS if not SHORT or s in short]
    return [
        pytest.param(row, setting, id=f"{row.name}-{setting}")
        for row in rows
        if row.short or not SHORT
        for setting in settings
        if setting != "attention" or row.enter is not None
    ]


def check(row: Row, setting: str, record: Callable[[str, object], None]) -> None:
    """The test of a row in a setting."""
    found = outcome(row, setting)
    record("zoo", f"{found.kind}|{row.name}|{setting}|{found.why.splitlines()[0] if found.why else ''}")
    if found.kind == "without":  # the model's own word, raised by it or read off its class
        assert setting not in row.expects
        return
    wanted = row.expects.get(setting, Expected(EQUAL, ""))
    assert found.kind == wanted.kind, f"{row.name}, {setting}: {found.kind}: {found.why}"
    assert wanted.words in found.why, found.why
    if found.kind == REFUSED:
        assert len(found.why.split()) > 4, f"not a sentence: {found.why!r}"
        assert found.why.rstrip().endswith("."), f"not a sentence: {found.why!r}"


# -- losses


def score(output: Any) -> Tensor:
    """A number that every floating tensor of an output takes part in, each entry in its own way."""
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    total: Any = 0.0
    for leaf in leaves:
        wide = leaf.double() if leaf.dtype == torch.float64 else leaf.float()
        target = torch.arange(wide.numel(), dtype=wide.dtype).mul(0.7).cos().view(wide.shape)
        total = total + (wide - target).square().mean()
    return total


def of_output(model: nn.Module, batch: Any, run: Call) -> Tensor:
    return score(run(model, *batch))
