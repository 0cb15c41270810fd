"""`selectune train` and `selectune eval`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectune.cli import signals, values
from selectune.cli.options import (
    PATTERN,
    ROWS,
    Data,
    Dtype,
    EvalSize,
    Json,
    KindOption,
    Label,
    MaxLength,
    Model,
    Pattern,
    Plugins,
    Retain,
    Revision,
    Shots,
    Text,
    Trust,
    Validation,
    Words,
    option,
)
from selectune.cli.output import ProgressBar, result, working
from selectune.errors import ConfigError

if TYPE_CHECKING:
    from selectune.models.evaluate import Evaluation
    from selectune.runs.result import RunResult

TRAIN_EXAMPLES = (
    "Examples:\n\nselectune train --model demo --task glue/rte --budget 103k --epochs 3 --out runs/rte\n\n"
    "selectune train --model ./my-model --task glue/cola --method id3:exp=1,every=10 --budget 0.17% --out runs/cola\n\n"
    "selectune train --model demo --task glue/rte --on lora:r=32 --budget 114k --out runs/on-lora\n\n"
    "selectune train --model demo --train my.jsonl --hold-out 0.1 --text question --label topic -b 1% -o runs/my"
    "\n\nselectune train --config runs/rte/run.json --seed 7 --out runs/rte-7"
)
EVAL_EXAMPLES = "Example:  selectune eval --model demo --delta runs/rte --task glue/rte --json"
SCOPE, LOOP, FILES = "Scope", "Training", "Files and checkpoints"
SEVERAL = "Several patterns"
_ENSEMBLE = ("generations", "growth", "temperature", "student")


_REPLACES = {  # a typed option takes the place of these in a file
    "epochs": ("max_steps",),
    "max_steps": ("epochs",),
    "validation": ("hold_out",),
    "hold_out": ("validation",),
    "train": ("task",),
    "task": ("train", "validation", "text", "label", "kind", "hold_out"),
}


def _from_file(ctx: typer.Context, path: str | None) -> str | None:
    """Makes the settings of a file the defaults of the options, so that typed options win."""
    if path is not None:
        from selectune.cli.settings import settings

        ctx.default_map = {**(ctx.default_map or {}), **settings(path, ctx.command.params)}
    return path


def train(
    ctx: typer.Context,
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for delta.safetensors and run.json.")],
    task: Annotated[str | None, option("The task to learn; see `selectune tasks`. Or --train.", "--task", "-t")] = None,
    method: Annotated[str, typer.Option(help="Such as id3:exp=1 or lora:r=8: `selectune methods`.")] = "id3",
    on: Annotated[str | None, option("Select from an adapter on the model: lora:r=32.", "--on")] = None,
    budget: Annotated[str | None, option("Scalars: 103k, 0.17%, or as many as lora:r=2 has.", "--budget", "-b")] = None,
    config_file: Annotated[
        str | None,
        option(
            "A YAML or JSON file of options, or a run.json; options on the command line win.",
            "--config",
            callback=_from_file,
            is_eager=True,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the head, data order, dropout and masks.")] = 6,
    data: Data = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantise: Annotated[
        str | None,
        option(
            "Train beside a quantised base: int8 (torchao), nf4 (bitsandbytes), or gguf, the model's file as it is."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    retain: Retain = None,
    pattern: Annotated[list[str] | None, PATTERN] = None,
    words: Words = None,
    shots: Shots = None,
    plugin: Plugins = None,
    as_json: Json = False,
    unlabeled: Annotated[
        str | None,
        option(
            "With two or more --pattern (PET): a file of rows that their models label, for one more model to learn.",
            "--unlabeled",
            "--unlabelled",
            panel=SEVERAL,
        ),
    ] = None,
    generations: Annotated[
        int | None,
        option("Trainings of each pattern's model; above 1, on rows of others too. Default: 1.", panel=SEVERAL),
    ] = None,
    growth: Annotated[int | None, option("Times as many rows in each generation. Default: 5.", panel=SEVERAL)] = None,
    temperature: Annotated[float | None, option("Of the soft labels. Default: 2.", panel=SEVERAL)] = None,
    student: Annotated[
        str | None, option("What learns in the end: a head (the default), or the first pattern.", panel=SEVERAL)
    ] = None,
    soft_labels: Annotated[
        str | None,
        option(
            "Learn from these rows instead, as predict writes them: from the probabilities of the classes.",
            "--soft-labels",
            panel=ROWS,
        ),
    ] = None,
    train: Annotated[
        str | None,
        option(
            "A file of rows to learn from: .jsonl(.gz), .csv, .tsv, .parquet; or a hub id, org/name:config@revision.",
            "--train",
            panel=ROWS,
        ),
    ] = None,
    validation: Validation = None,
    text: Text = None,
    label: Label = None,
    kind: KindOption = None,
    hold_out: Annotated[
        float | None, option("Share of the training rows to measure on instead: 0.1.", "--hold-out", panel=ROWS)
    ] = None,
    train_size: Annotated[
        int | None, option("Learn from so many rows only, the same for every method and seed.", panel=LOOP)
    ] = None,
    train_size_seed: Annotated[int, typer.Option(help="Seed of these rows.", rich_help_panel=LOOP)] = 0,
    eval_size: EvalSize = None,
    checkpoint_budgets: Annotated[
        list[str] | None,
        option("Save and measure a delta as so many scalars are selected: 40k,80k.", panel=FILES),
    ] = None,
    include: Annotated[
        list[str] | None, option("Select only from these tensors: '*.attention.*'; repeatable.", panel=SCOPE)
    ] = None,
    exclude: Annotated[list[str] | None, option("Not from these: '*embeddings*'; repeatable.", panel=SCOPE)] = None,
    train_fully: Annotated[
        list[str] | None, option("Train these in full, outside the budget: 'classifier.*'.", panel=SCOPE)
    ] = None,
    lr: Annotated[
        float | None, option("Learning rate. Default: the method's, 5e-4 for most, 2e-3 on LoRA.", "--lr", panel=LOOP)
    ] = None,
    epochs: Annotated[float | None, option("Passes over the data. Default: the task's.", panel=LOOP)] = None,
    max_steps: Annotated[int | None, option("Optimizer steps, in place of --epochs.", panel=LOOP)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a backward pass.", rich_help_panel=LOOP)] = 16,
    accumulation: Annotated[int, typer.Option(help="Backward passes in a step.", rich_help_panel=LOOP)] = 1,
    max_length: Annotated[int | None, option("Tokens of an example. Default: the task's.", panel=LOOP)] = None,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batch rows of similar length.", rich_help_panel=LOOP)
    ] = False,
    schedule: Annotated[str, option("Learning rate: linear (default), cosine, constant.", panel=LOOP)] = "linear",
    warmup: Annotated[float, typer.Option(help="Warmup steps, or a share below 1.", rich_help_panel=LOOP)] = 0.0,
    optimizer: Annotated[
        str | None,
        option("adamw, adamw-entry (each entry counts its own steps) or sm3. Default: the method's.", panel=LOOP),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decay towards the base.", rich_help_panel=LOOP)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.", rich_help_panel=LOOP)] = 1.0,
    eval_every: Annotated[int | None, option("Steps between evaluations. Default: the task's.", panel=LOOP)] = None,
    report_to: Annotated[
        list[str] | None, option("A tracker: tensorboard, trackio, wandb; repeatable.", "--report-to", panel=LOOP)
    ] = None,
    save_every: Annotated[int | None, option("Steps between checkpoints. Default: none.", panel=FILES)] = None,
    keep: Annotated[int | None, option("Number of checkpoints to keep. Default: all.", panel=FILES)] = None,
    full_checkpoints: Annotated[
        bool, typer.Option("--full-checkpoints", help="Save the whole model in each.", rich_help_panel=FILES)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest whole one in --out.", rich_help_panel=FILES)
    ] = False,
    resume_from: Annotated[str | None, option("Resume from this one.", "--resume-from", panel=FILES)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in --out.", rich_help_panel=FILES)
    ] = False,
) -> None:
    """Train a few scalars of a model on a task, save them as a delta, and measure the saved delta."""
    given = dict(ctx.params)
    if resume and resume_from:
        raise ConfigError("--resume takes the newest checkpoint in --out and --resume-from names one: give one.")
    if config_file is not None:
        found_in = ctx.get_parameter_source
        typed = {name for name in given if getattr(found_in(name), "name", "") == "COMMANDLINE"}
        for name in sorted(typed & _REPLACES.keys()):
            given |= dict.fromkeys(set(_REPLACES[name]) - typed)
        train, validation = given["train"], given["validation"]
    given |= {name: path and os.path.expanduser(path) for name, path in (("out", out), ("data", data))}
    files = (("train", train), ("validation", validation), ("soft_labels", soft_labels))
    given |= {name: path and os.path.expanduser(path) for name, path in files}
    given["pattern"], given["words"] = values.pattern(pattern[0]) if pattern else None, words
    several = {name: given.pop(name) for name in _ENSEMBLE if given[name] is not None}
    if unlabeled is None and (len(pattern or ()) > 1 or several):
        raise ConfigError("Several patterns need rows that their models label: --unlabeled FILE.")
    if unlabeled is not None:
        if resume_from:
            raise ConfigError("--resume-from names a checkpoint of one run; several patterns go on with --resume.")
        if shots is not None:
            raise ConfigError("--shots is for one pattern; the models of several are trained without examples.")
        given |= {"pattern": None, "words": None}
    given["budget"] = None if budget is None else values.budget_or_adapter(budget)
    from selectune.runs.folder import run_folder
    from selectune.runs.stop import Stop

    stop = Stop()
    with run_folder(given["out"], bool(resume or resume_from), overwrite) as folder, working():
        from selectune.runs.config import RunConfig, patterns
        from selectune.runs.training import run

        for name in ("include", "exclude", "train_fully", "text", "words"):
            given[name] = patterns(given[name])
        given["report_to"] = () if report_to is None or report_to == ["none"] else tuple(report_to)
        given["plugin"] = tuple(plugin or ())
        given["checkpoint_budgets"] = tuple(
            values.budget(text, "--checkpoint-budgets") for text in patterns(checkpoint_budgets)
        )
        config = RunConfig(**{field.name: given[field.name] for field in dataclasses.fields(RunConfig)})
        signals.heed(stop)
        progress = None if folder.shared else ProgressBar()
        if unlabeled is None:
            found, record = run(config, progress, resume_from or resume, overwrite, stop, folder), {}
        else:
            from selectune.study.ensemble import Ensemble, run_ensemble

            lists = [patterns([one]) for one in words or ()] if "," in "".join(words or ()) else [patterns(words)]
            plan = Ensemble(
                tuple(str(values.pattern(one)) for one in pattern or ()), tuple(lists), os.path.expanduser(unlabeled),
                **several,
            )  # fmt: skip
            found, record = run_ensemble(config, plan, progress, resume, overwrite, stop, folder)
    if not folder.shared:
        result(as_json, found.as_json() | ({"ensemble": record} if record else {}), _of_patterns(record) + _told(found))


def _of_patterns(record: Mapping[str, Any]) -> str:
    """A line for each model of an ensemble, if there is one."""
    return "".join(
        f"generation {number}, pattern {i}: {sum(model['rows']):,} rows, {model['value']:.4f}\n"
        for number, models in enumerate(record.get("generations", ()), 1)
        for i, model in enumerate(models, 1)
    )


def _told(found: RunResult) -> str:
    evaluation = found.evaluation
    return (
        f"{evaluation.task}{'' if found.config.train is None else f' ({found.kind})'}: {evaluation.metric} "
        f"{evaluation.value:.4f} on {evaluation.examples:,} examples, {found.steps:,} steps in {found.seconds:.0f} s"
        f"{_retained(evaluation)}\n"
        + (
            f"{found.selected:,} of {found.budget:,} scalars selected, {found.verification.changed:,} changed"
            + (f", {found.trained:,} trained in all" if found.trained != found.selected else "")
            if found.budget
            else f"{found.trained:,} scalars trained, in whole tensors"
        )
        + "".join(
            f"\nbudget {row['budget']:,}: {row['selected']:,} selected at step {row['step']:,}, "
            f"{evaluation.metric} {row['value']:.4f}, {found.delta.parent / 'budget-'}{row['budget']}"
            for row in found.as_json().get("checkpoints", ())
        )
        + f"\n{found.delta} ({found.delta_bytes:,} bytes)"
    )


def evaluate(
    model: Model,
    task: Annotated[
        str | None, option("The task to measure; see `selectune tasks`. Default: the delta's own.", "--task", "-t")
    ] = None,
    delta: Annotated[
        str | None, option("The delta to apply. Without it the base is measured.", "--delta", "-d")
    ] = None,
    data: Data = None,
    validation: Validation = None,
    text: Text = None,
    label: Label = None,
    kind: KindOption = None,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option(help="Seed of the head, for a base without a delta.")] = 6,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    retain: Retain = None,
    pattern: Pattern = None,
    words: Words = None,
    shots: Shots = None,
    eval_size: EvalSize = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Measure a model with a delta on a task's validation rows. With the run's --eval-size, it is the run's number."""
    from selectune import plugins
    from selectune.models.recorded import task_on
    from selectune.models.restore import Source, evaluate_delta
    from selectune.runs.config import patterns
    from selectune.tasks import OwnRows, first_rows, load, with_shots

    with working():
        plugins.add_files(plugin or ())
        source = Source(model, revision, dtype, trust_remote_code)
        rows = OwnRows(None, validation and os.path.expanduser(validation), patterns(text), label, kind)
        asked = task_on(task, delta, rows, values.pattern(pattern), patterns(words))
        if shots is not None:
            if delta is not None:
                raise ConfigError("--shots is for a base; a delta records the examples that it was trained with.")
            asked = with_shots(asked, first_rows(asked, load(asked, "train", data), shots).examples)
        found = evaluate_delta(source, delta, asked, data, max_length, seed, retain, eval_size)
    told = f"{found.task}: {found.metric} {found.value:.4f} on {found.examples:,} examples"
    result(as_json, found.as_json(), told + _retained(found))


def _retained(found: Evaluation) -> str:
    """A line about what was lost on another text, if that was measured."""
    kept = found.retention
    if kept is None:
        return ""
    return (
        f"\n{kept.text}: loss per token {kept.before:.4f} before, {kept.after:.4f} after, {kept.forgetting:+.4f} nats "
        f"on {kept.tokens:,} tokens"
    )
