"""The contract: what a score, a selection and a schedule are, and what a score may read.

A method (`selectune.method.Method`) consists of these values:
    scope     which tensors may be selected                    selectune/scope.py
    score     one number per entry, higher = more worth it     selectune/scores/
    select    scores x quota -> exactly that many entries      selectune/select.py
    schedule  is it time to select, and how many by then       selectune/schedule.py
    dense     what a dense phase trains, if there is one       selectune/phases.py

Letters in shapes: N entries in scope, B the budget, n entries of one tensor, q a quota.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

from torch import Generator, Tensor

from selectune.errors import ConfigError


class Reads(enum.StrEnum):
    """What a score reads; the engine computes only that.

    The last five are *calibrated*: read from data at fixed weights, through `attach(..., calibration=batches,
    loss=callable)`. They keep one float32 per entry in scope while they run (CURVATURE two, and a graph).
    """

    NOTHING = "nothing"  # f(weight, generator): only the shape, and a seeded generator
    WEIGHT = "weight"  # f(weight): one pass over the weights, no data
    MATRIX = "matrix"  # f(weight) of a whole tensor in its own shape, not elementwise, no data
    GRADIENT = "gradient"  # f(weight, gradient): the gradient of the present step
    CHANGE = "change"  # f(weight, change): the weight before a dense phase, and what the phase added to it
    FACTORS = "factors"  # f(row, column): the optimizer's numbers for an entry's row and column, >= 0
    EXAMPLES = "examples"  # sum over single examples of f(weight, gradient): one backward pass each
    BATCHES = "batches"  # sum over mini-batches of f(weight, gradient): one backward pass each
    POOLED = "pooled"  # f(weight, gradient summed over mini-batches): one backward pass each
    CURVATURE = "curvature"  # f(weight, H g), Hessian and gradient summed over mini-batches: three passes each
    FLOW = "flow"  # sum over inputs of f(|w|, dR/d|w|): R = loss(model, input) with absolute weights

    @property
    def calibrated(self) -> bool:
        """Whether the score is read from calibration data at fixed weights."""
        return self in (Reads.EXAMPLES, Reads.BATCHES, Reads.POOLED, Reads.CURVATURE, Reads.FLOW)


FUSED = {"ratio": "|g| / (|w| + eps)^exp", "small": "-|w|"}


@dataclass(frozen=True)
class Score:
    """One number per entry, float32 (float64 for float64 weights); higher means more worth training.

    `function` gets flat pieces of a tensor of any length, so it must be elementwise, unless it reads "matrix".
    `above`: only entries that score strictly above this are eligible. A gradient score with `above=0` promises to be 0
    where the gradient is 0, so entries without a gradient are never selected. NaN or infinity cancels the selection of
    that step.

    `weighting` takes |w| and the score's parameters, in float64, and rises or falls throughout. A score that has it
    may be selected by without forming dense gradients (`ops.bounds`).

    The engine reads these parameters of a calibrated score: `examples`, `batches` (how many; absent or None: all),
    `labels` ("data", "model"), `clip` (each tensor's gradient is scaled down to this norm first), `train_mode` (the
    model is in training mode, else in eval mode), `temperature` (passed on as `loss(model, batch, temperature=T)`
    unless it is 1), `hardest` (only the n examples with the largest loss count).
    """

    name: str
    reads: Reads
    function: Callable[..., Tensor] = field(repr=False)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    above: float | None = None
    fused: str | None = None  # a form that `ops` scores and filters in one pass: a key of FUSED
    weighting: Callable[..., Tensor] | None = field(default=None, repr=False)  # the score is |g| weighting(|w|)
    drawn: float = 0.0  # matrices that are all 0 are scored as if drawn from N(0, drawn^2), since 0 times g ties

    def __call__(
        self,
        weight: Tensor,  # (n,) float32 or float64
        gradient: Tensor | None = None,  # (n,) same dtype; None unless the score reads it
        generator: Generator | None = None,
    ) -> Tensor:  # (n,)
        """The scores of n entries. Raises ConfigError if the function gives anything else or changes its arguments."""
        given = [part for part in (weight, gradient) if part is not None and not part.is_inference()]
        versions = [part._version for part in given]
        if self.reads in (Reads.WEIGHT, Reads.MATRIX):
            scores = self.function(weight, **self.parameters)
        elif self.reads is Reads.NOTHING:
            scores = self.function(weight, generator, **self.parameters)
        else:
            scores = self.function(weight, gradient, **self.parameters)
        wrote = [part._version for part in given] != versions
        if wrote or not isinstance(scores, Tensor) or scores.shape != weight.shape or not scores.is_floating_point():
            got = f"{tuple(scores.shape)}, {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(
                f"The score '{self.name}' has to give one floating number for each entry and change no argument: "
                f"for weights of shape {tuple(weight.shape)} it "
                f"{'wrote into its arguments' if wrote else f'gave {got}'}."
            )
        return scores

    def weigh(self, size: Tensor) -> Tensor:
        """What |g| is multiplied by at weights of these sizes |w| (n,); only where the score has a `weighting`."""
        if self.weighting is None:
            raise ConfigError(f"The score '{self.name}' does not declare weighting=.")
        return self.weighting(size, **self.parameters)


def score(
    reads: str,
    above: float | None = None,
    fused: str | None = None,
    weighting: Callable[..., Tensor] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Score]]:
    """Turns a plain function of tensors into a maker of scores.

    Keyword parameters of the function become parameters of the maker:

    >>> import torch, selectune as st
    >>> @st.score(reads="gradient", above=0.0)
    ... def taylor(weight, gradient, power=1.0):
    ...     return (weight * gradient).abs() ** power
    >>> taylor(power=2.0)(torch.tensor([2.0]), torch.tensor([3.0])).item()
    36.0
    """
    known = Reads(_known(reads, [r.value for r in Reads], "reads"))
    if fused is not None:
        _known(fused, list(FUSED), "fused form")
    if weighting is not None and known is not Reads.GRADIENT:
        raise ConfigError(f'weighting= is for scores of the step\'s gradient, reads="gradient", not "{known}".')

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Score]:
        signature = inspect.signature(function)
        tensors = 1 if known in (Reads.WEIGHT, Reads.MATRIX) else 2
        defaults = dict(list(signature.parameters.items())[tensors:])
        if fused == "ratio" and not {"exp", "eps"} <= set(defaults):
            raise ConfigError(
                f"The score '{function.__name__}' has the form {FUSED[fused]}, so it must take exp and eps."
            )

        @functools.wraps(function)
        def make(**parameters: Any) -> Score:
            for name in parameters:
                _known(name, list(defaults), f"parameter of the score '{function.__name__}'")
            full = {k: p.default for k, p in defaults.items() if p.default is not p.empty} | parameters
            missing = [k for k in defaults if k not in full]
            if missing:
                raise ConfigError(f"The score '{function.__name__}' needs {', '.join(missing)}.")
            return Score(function.__name__, known, function, full, above, fused, weighting)

        return make

    return decorate


def _known(value: str, allowed: Sequence[str], what: str) -> str:
    if value not in allowed:
        raise ConfigError(f"Unknown {what} '{value}'. Known: {', '.join(allowed) or 'none'}.")
    return value


class Collector(Protocol):
    """Takes scores piece by piece and keeps the best; it never sees all of them at once.

    A collector may have a number `cutoff`: entries that score below it need not be offered.
    """

    def offer(self, tensor: int, flat: Tensor | int, scores: Tensor, carry: Tensor | None = None) -> None:
        """Takes scores (n,) of entries of tensor number `tensor`; -inf = not eligible.

        `flat`: their flat indices (n,) int64, or the first of n consecutive ones. `carry` (n,): a number
        that stays with each entry (its gradient), by default 0.
        """
        ...

    def close(self) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen entries, best first: tensors, flat indices, carried numbers, each (k <= quota,).

        They are on the CPU, or on the device of queued scores.
        """
        ...


@runtime_checkable
class Queueing(Collector, Protocol):
    """A collector that can also take scores without reading them, so that the host does not wait for a GPU."""

    def queue(self, tensor: int, flat: Tensor | int, scores: Tensor, carry: Tensor | None = None) -> None:
        """As `offer`, with `flat` ascending; no number leaves the device before `close`. A NaN voids the result."""
        ...


@runtime_checkable
class Select(Protocol):
    """scores x quota -> support."""

    def collector(self, quota: int, sizes: Sequence[int], seed: int) -> Collector:
        """A new collector of `quota` entries over tensors of these sizes."""
        ...


@runtime_checkable
class Allocating(Select, Protocol):
    """A selection that divides its quota among the tensors in advance."""

    def shares(self, weights: Iterable[Tensor]) -> list[int] | None:
        """What each tensor's part of the quota is in proportion to, read from the base once; None: its size."""
        ...

    def allocate(self, total: int, sizes: Sequence[int], shares: Sequence[int] | None = None) -> list[int]:
        """How many entries each tensor gets: at most its size, and `total` in all."""
        ...

    def per_tensor(self, counts: Sequence[int], sizes: Sequence[int], seed: int) -> Collector:
        """A new collector of the best `counts[j]` entries of every tensor j."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """Two questions, asked at optimizer step 0, 1, 2, ...: is it time, and how many by then?"""

    @property
    def keeps(self) -> bool:
        """True: at most `budget` entries ever differ from the base. False: each selection starts from all entries."""
        ...

    def resolve(self, eligible: int) -> Schedule:
        """The same schedule with its budget as a count, checked against the number of eligible entries."""
        ...

    @property
    def budget(self) -> int | float | None:
        """The budget B: a count after `resolve`."""
        ...

    @property
    def steps(self) -> int | None:
        """The schedule's number of optimizer steps T, if it has one."""
        ...

    def due(self, step: int) -> bool:
        """Whether entries are selected at this step."""
        ...

    def target(self, step: int) -> int:
        """How many entries are selected once this step's selection is done."""
        ...


@runtime_checkable
class Phased(Schedule, Protocol):
    """A schedule with dense steps. Entries are selected at the first sparse step after dense ones."""

    def dense(self, step: int) -> bool:
        """Whether every entry in scope is trained at this step."""
        ...


@runtime_checkable
class DropAndGrow(Schedule, Protocol):
    """A schedule that drops and grows. The budget is selected at random before step 0, divided by an `Allocating`.

    At every due step, every tensor drops its least moved entries, which become the base again, bit for bit. As many
    entries grow, best score first, starting from the base. A score that reads gradients reads

        without a window   the gradient of the due step
        with a window      the candidates' gradients, summed over the window. The candidates are the best entries of
                           a tensor, as many as it has selected, in the first backward pass after `opens`. Later
                           passes form only their gradients, so memory stays O(B)
    """

    @property
    def window(self) -> int:
        """How many steps before a due step candidates are watched; 0: there are none."""
        ...

    @property
    def drop(self) -> str:
        """By what the entries to drop are the smallest: "change", |value - base|, or "weight", |value|."""
        ...

    @property
    def regrow(self) -> bool:
        """Whether a dropped entry may grow again at once; it then keeps its value and its optimizer state."""
        ...

    def opens(self, step: int) -> bool:
        """Whether candidates are chosen at this step."""
        ...

    def share(self, step: int) -> Fraction:
        """The share of a tensor's entries that is dropped and grown at this step: floor(share k) of k entries."""
        ...
