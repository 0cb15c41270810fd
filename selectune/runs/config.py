"""One run's settings, checked before a model or a row of data is touched."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune import plugins
from selectune.adapters import KINDS, Spec, parse
from selectune.errors import ConfigError
from selectune.integrations.quantise import QUANTISED
from selectune.method import Method
from selectune.models.adapted import method_of, peer, spec_of
from selectune.models.bases import DTYPES
from selectune.recipes import RECIPES
from selectune.recipes.named import named
from selectune.runs.trackers import check_trackers
from selectune.schedule import Increment, Quotas
from selectune.scope import Scope
from selectune.spec import split
from selectune.tasks import OwnRows, Task, as_cloze
from selectune.tasks.labels import form_of

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "adamw-entry", "sm3")  # as selectune.runs.trainer makes them
LEARNING_RATES = {
    "full": 5e-5, "child-tuning-d": 4e-5, "child-tuning-f": 4e-5, "spiel-ma": 2e-3, "bitfit": 2e-3,
    # entries that no gradient has chosen need long steps (docs/results/core.md)
    **dict.fromkeys(("random", "increment-random", "repeat-random", "pafi", "increment-pafi", "paca"), 8e-3),
}  # fmt: skip
DENSE_RATES = {"lt-sft": 5e-5, "diff-pruning": 1e-5}  # the papers' rates for dense steps
LEARNING_RATE = 5e-4
LORA_RATE = 2e-3  # of entries of LoRA that gradients choose, which learn slowly at 5e-4 (docs/results/on-lora.md)
_MANY = 1 << 30  # in place of a number of steps that is not known yet


@dataclass(frozen=True)
class RunConfig:
    """Settings of one training run. None uses the default of the method, the task or the checkpoint.

    `method`: a recipe with its options, `id3:exp=1,every=10`, or an adapter that is trained in full, `lora:r=16`. `on`:
    an adapter under a recipe, `pfeiffer`. `budget`: a count (int), a density (float below 1), or an adapter with as
    many scalars, `lora:r=2`. `lr` None: 5e-5 for `full`, 4e-5 for Child-Tuning, 2e-3 for BitFit and SpIEL-MA, 8e-3
    where no gradient chooses (random, PaFi, PaCA), an adapter's own in `selectune.adapters.KINDS`, for the others 2e-3
    on LoRA and 5e-4 elsewhere. `epochs`, `eval_every`, `max_length` None: the papers' values for the task. `seed` draws
    the head, the data order, dropout and the method's choices. `batch_size` rows make one backward pass and
    `accumulation` passes make one step. `save_every`: steps between checkpoints; the newest `keep` remain (None: all),
    and they hold the model only with `full_checkpoints`. `group_by_length` batches rows of similar length, which saves
    padding (half the tokens on STS-B) and changes the order. `report_to`: trackers of transformers that get the log,
    such as tensorboard. `retain`: a text on which base and tuned model are compared. `plugin`: Python files with more
    methods and tasks.

    In place of a task, `train` names a file of rows (or a data set of the hub), `text` its columns of text, `label`
    that of the label, and `validation` another file; see `selectune.tasks.OwnRows`. `hold_out`: measure on that share
    of the training rows instead, as a search for a learning rate should. `train_size`: only so many of the training
    rows, the same for every method and `seed`; see `selectune.tasks.first_rows`. `eval_size`: measure on at most so
    many rows, which are the same too. `pattern`, `words`: a task of classes as a cloze, which a language model answers
    with its own head; see `selectune.tasks.Cloze`. `shots`: so many training rows with their words stand before every
    row of a cloze. `soft_labels`: a file of rows to learn from in place of the training rows, by the probability of
    each class; see `selectune.tasks.read_soft`. `optimizer`: adamw, adamw-entry (each entry counts its own steps) or
    sm3; None: the method's.

    `quantise`: `int8` or `nf4`: the base's linear layers are quantised after loading; `gguf`: the blocks of the file
    that the model is loaded from are kept. They stay so, to the bit, and the offsets lie beside them; see
    docs/how-to/quantised.md.

    `checkpoint_budgets`: as the support first reaches each of these numbers of scalars, a delta is saved and measured,
    for methods whose support grows.

    >>> RunConfig(model="demo", task="glue/rte", budget=1000).learning_rate
    0.0005
    """

    model: str
    task: str | None = None
    method: str = "id3"
    on: str | None = None
    budget: int | float | str | None = None
    lr: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    max_length: int | None = None
    seed: int = 6
    out: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    train_fully: tuple[str, ...] = ()
    eval_every: int | None = None
    save_every: int | None = None
    keep: int | None = None
    full_checkpoints: bool = False
    data: str | None = None
    revision: str | None = None
    dtype: str | None = None
    quantise: str | None = None
    trust_remote_code: bool = False
    warmup: float = 0.0
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    group_by_length: bool = False
    report_to: tuple[str, ...] = ()
    retain: str | None = None
    plugin: tuple[str, ...] = ()
    train: str | None = None
    validation: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    kind: str | None = None
    hold_out: float | None = None
    train_size: int | None = None
    train_size_seed: int = 0
    checkpoint_budgets: tuple[int, ...] = ()
    pattern: str | None = None
    words: tuple[str, ...] = ()
    optimizer: str | None = None
    shots: int | None = None
    soft_labels: str | None = None
    eval_size: int | None = None

    def __post_init__(self) -> None:
        plugins.add_files(self.plugin)
        plugins.want_method(self.recipe)
        _check_rows(self)
        counts = ("max_steps", "max_length", "eval_every", "save_every", "keep", "train_size", "eval_size", "shots")
        for name in ("batch_size", "accumulation", *counts):
            _count(name, getattr(self, name), optional=name not in ("batch_size", "accumulation"))
        for name in ("lr", "epochs", "weight_decay", "warmup", "max_grad_norm"):
            _number(name, getattr(self, name), optional=name in ("lr", "epochs"))
        if self.epochs is not None and self.max_steps is not None:
            raise ConfigError(f"Give epochs ({self.epochs}) or max_steps ({self.max_steps}), not both.")
        for name in ("seed", "train_size_seed"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**32:
                raise ConfigError(f"{name}={value!r}: must be an int from 0 to {2**32 - 1}.")
        choices = {"schedule": SCHEDULES, "dtype": (None, *DTYPES), "optimizer": (None, *OPTIMIZERS)}
        for name, known in {**choices, "quantise": (None, *QUANTISED)}.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"Unknown {name} '{getattr(self, name)}'. Known: {', '.join(filter(None, known))}.")
        if self.out is not None and not self.out.strip():
            raise ConfigError("out is empty; it must name a folder, which is made if it is missing.")
        if self.out is not None and Path(self.out).exists() and not Path(self.out).is_dir():
            raise ConfigError(f"out={self.out} is a file; it must be a folder, which is made if it is missing.")
        if self.keep is not None and self.save_every is None:
            raise ConfigError(f"keep={self.keep} needs save_every: without it no checkpoint is written.")
        method = build_method(self, self.max_steps or _MANY, None if self.adapter_for_size is None else 1)
        if self.checkpoint_budgets:
            _check_budgets(self, method)
        if self.report_to:
            check_trackers(self.report_to)

    @property
    def learning_rate(self) -> float:
        if self.lr is not None:
            return self.lr
        adapter = self.adapter
        if adapter is not None and (peer(self.method) or self.recipe == "full"):
            return KINDS[adapter.kind].lr
        on_lora = adapter is not None and adapter.kind == "lora" and not RECIPES[self.recipe].beside
        return LEARNING_RATES.get(self.recipe, LORA_RATE if on_lora else LEARNING_RATE)

    @functools.cached_property
    def the_task(self) -> Task:
        """The task of the run. Rows of one's own are read for it, when it is first asked for, and checked."""
        task = plugins.task(self.task) if self.task is not None else self.own.task()
        return task if self.pattern is None else as_cloze(task, self.pattern, self.words)

    @property
    def own(self) -> OwnRows:
        """The rows in place of a task, as the settings name them."""
        return OwnRows(self.train, self.validation, self.text, self.label, self.kind, self.hold_out)

    @property
    def recipe(self) -> str:
        """The method's name, without its options."""
        return split(self.method)[0]

    @property
    def canonical(self) -> str:
        """The canonical text of the method: equal methods have equal texts."""
        return str(peer(self.method) or named(self.method))

    @property
    def adapter(self) -> Spec | None:
        """The adapter that is put on the model before training."""
        return spec_of(self.method, self.on)

    @property
    def adapter_for_size(self) -> Spec | None:
        """The adapter whose number of scalars is the budget, if the budget is given so."""
        return parse(self.budget) if isinstance(self.budget, str) else None

    def steps(self, examples: int, processes: int = 1) -> int:
        """The number of optimizer steps over this many training examples. The last batch and window may be short."""
        if self.max_steps is not None:
            return self.max_steps
        epochs = self.epochs if self.epochs is not None else self.the_task.epochs
        an_epoch = math.ceil(math.ceil(examples / (self.batch_size * processes)) / self.accumulation)
        return math.ceil(epochs * an_epoch)

    def as_json(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def build_method(config: RunConfig, steps: int, size: int | None = None) -> Method:
    """The method of a run. A setting that its recipe does not take is refused, not ignored.

    `size`: the number of scalars of the adapter that the budget names.
    """
    spec = spec_of(config.method, config.on)
    if spec is not None and config.on is None:
        return _adapter_method(config, spec)
    chosen = named(config.method, also=tuple(KINDS))
    takes = inspect.signature(chosen.recipe.function).parameters
    rates = {"dense_lr": DENSE_RATES.get(chosen.name)} if "dense_lr" in takes else {}
    budget = size if isinstance(config.budget, str) else config.budget
    return chosen.make(budget, steps, **rates, **_scope(config, takes))


def _adapter_method(config: RunConfig, spec: Spec) -> Method:
    for name in ("budget", "include", "exclude", "train_fully"):
        if getattr(config, name) not in (None, ()):
            raise ConfigError(
                f"The method '{config.method}' trains all of its adapter and takes no {name}; its options are "
                f"written {spec.kind}:name=value and are {', '.join(spec.options) or 'none'}. To select from an "
                f"adapter, give a recipe and on='{spec.kind}' (command line: --on {spec.kind})."
            )
    return method_of(spec)


def _scope(config: RunConfig, takes: Any) -> dict[str, Any]:
    if not (config.include or config.exclude or config.train_fully):
        return {}
    if "scope" not in takes:
        raise ConfigError(f"The method '{config.method}' takes no include, exclude or train_fully.")
    include = config.include or takes["scope"].default
    if config.train_fully and "train_fully" not in takes:
        raise ConfigError(
            f"The method '{config.method}' trains whole tensors anyway and takes no train_fully: choose them by "
            "include and exclude."
        )
    if not config.exclude and not config.train_fully:
        return {"scope": include}
    return {"scope": Scope(include=include, exclude=config.exclude, train_fully=config.train_fully)}


def _check_rows(config: RunConfig) -> None:
    """Checks that there is a task or rows of one's own, and that these are told in full."""
    if (config.task is None) == (config.train is None):
        raise ConfigError(
            f"A run needs either a task or rows of your own, got {'neither' if config.task is None else 'both'}. Give "
            "task (command line: --task, one of `selectune tasks`), or train (--train FILE, with --validation FILE, "
            "--text COLUMN and --label COLUMN)."
        )
    if config.hold_out is not None and not 0 < config.hold_out < 1:
        raise ConfigError(f"hold_out={config.hold_out!r}: must be a share of the training rows, above 0 and below 1.")
    own = ("validation", "text", "label", "kind")
    given = [name for name in own if getattr(config, name) not in (None, ())]
    if (config.words or config.shots) and config.pattern is None:
        what = "words are those" if config.words else "shots need the words"
        raise ConfigError(f"{what} of a pattern, and there is none (command line: --pattern TEXT).")
    if config.soft_labels is not None and config.train_size is not None:
        raise ConfigError(
            f"train_size={config.train_size} is a number of the task's own rows, and soft_labels takes their place."
        )
    if config.task is not None:
        _ = config.the_task
        if given:
            raise ConfigError(f"{', '.join(given)}: only for rows of your own (train); {config.task} has its own.")
        return
    if config.data is not None:
        raise ConfigError(f"data={config.data} is a folder of published tasks; train names the file of rows itself.")
    if not config.text:
        raise ConfigError(
            "text is missing: the column of the text (command line: --text COLUMN), or two, with a comma."
        )
    if config.validation is None and config.hold_out is None:
        raise ConfigError(
            "There is nothing to validate on. Give a file of rows that are not trained on (validation, command line: "
            "--validation FILE), or hold out a tenth of the training rows (hold_out=0.1, command line: --hold-out 0.1)."
        )
    if config.validation is not None and config.hold_out is not None:
        raise ConfigError("Validate on the rows in validation or on a held-out share (hold_out), not both.")
    if config.kind is not None:
        form_of(config.kind)


def _check_budgets(config: RunConfig, method: Method) -> None:
    """Refuses counts that are none, and methods whose support does not grow step by step and keep what it has."""
    budgets = config.checkpoint_budgets
    if any(type(count) is not int or count < 1 for count in budgets) or sorted(set(budgets)) != list(budgets):
        told = ", ".join(map(str, budgets))
        raise ConfigError(
            f"checkpoint_budgets={told}: must be counts of scalars (no shares) that rise, such as 40k,80k,160k."
        )
    if not isinstance(method.schedule, Increment | Quotas):
        raise ConfigError(
            f"checkpoint_budgets need a method whose support grows step by step and keeps what it has, such as id3; "
            f"{config.recipe} does not."
        )


def _number(name: str, value: Any, optional: bool) -> None:
    """Checks a finite number: above 0 where None is a value too, else at least 0."""
    if value is None and optional:
        return
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (real and value is not None and (value > 0 or (value == 0 and not optional))):
        raise ConfigError(f"{name}={value!r}: must be a finite number {'above' if optional else 'of at least'} 0.")


def _count(name: str, value: Any, optional: bool) -> None:
    if not (value is None and optional) and (type(value) is not int or value < 1):
        raise ConfigError(f"{name}={value!r}: must be an int of at least 1.")


def patterns(values: Sequence[str] | None) -> tuple[str, ...]:
    """The patterns of repeated options, each with one pattern or several separated by commas."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())
