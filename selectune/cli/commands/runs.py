"""`selectune train` and `selectune eval`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from selectune.cli import signals, values
from selectune.cli.options import Data, Dtype, Json, MaxLength, Model, Plugins, Revision, Trust
from selectune.cli.output import ProgressBar, result, working
from selectune.errors import ConfigError

if TYPE_CHECKING:
    from selectune.runs.training import RunResult

TRAIN_EXAMPLES = (
    "Examples:\n\nselectune train --model demo --task glue/rte --budget 103k --epochs 3 --out runs/rte\n\n"
    "selectune train --model ./my-model --task glue/cola --method id3:exp=1,every=10 --budget 0.17% --out runs/cola\n\n"
    "selectune train --model demo --task glue/rte --on lora:r=32 --budget 114k --out runs/on-lora\n\n"
    "selectune train --config runs/rte/run.json --seed 7 --out runs/rte-7"
)
EVAL_EXAMPLES = "Example:  selectune eval --model demo --delta runs/rte --task glue/rte --json"
SCOPE, LOOP, FILES = "What may be chosen", "Training", "Files and checkpoints"


def _from_file(ctx: typer.Context, path: str | None) -> str | None:
    """Settings of a file become the defaults of the options, so that what is typed comes first."""
    if path is not None:
        from selectune.cli.settings import settings

        ctx.default_map = {**(ctx.default_map or {}), **settings(path, ctx.command.params)}
    return path


def train(
    ctx: typer.Context,
    model: Model,
    task: Annotated[str, typer.Option("--task", "-t", help="What to learn; `selectune tasks` lists them.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for delta.safetensors and run.json.")],
    method: Annotated[
        str, typer.Option(help="id3:exp=1,every=10, or a peer: lora:r=8; see `selectune methods`.")
    ] = "id3",
    on: Annotated[
        str | None,
        typer.Option("--on", help="Select from a module on the frozen model: lora:r=32.", show_default=False),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", "-b", help="Scalars that may change: 103k, 0.17%, or as many as lora:r=2.", show_default=False
        ),
    ] = None,
    config_file: Annotated[
        str | None,
        typer.Option(
            "--config",
            help="A YAML or JSON file of options, or a run.json; what is typed comes first.",
            callback=_from_file,
            is_eager=True,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the head, data order, dropout, random masks.")] = 6,
    data: Data = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only these tensors: patterns such as '*.attention.*'; repeatable.", rich_help_panel=SCOPE),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Not these, such as '*embeddings*'.", rich_help_panel=SCOPE)
    ] = None,
    train_fully: Annotated[
        list[str] | None,
        typer.Option(help="Trained whole, outside the budget: 'classifier.*'.", rich_help_panel=SCOPE),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Learning rate. Default: the method's, 5e-4 for most.",
            show_default=False,
            rich_help_panel=LOOP,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the data. Default: the task's.", show_default=False, rich_help_panel=LOOP),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps, in place of --epochs.", show_default=False, rich_help_panel=LOOP)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a backward pass.", rich_help_panel=LOOP)] = 16,
    accumulation: Annotated[int, typer.Option(help="Backward passes in a step.", rich_help_panel=LOOP)] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of an example. Default: the task's.", show_default=False, rich_help_panel=LOOP),
    ] = None,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batches of rows of like length.", rich_help_panel=LOOP)
    ] = False,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate: linear, cosine or constant.", rich_help_panel=LOOP)
    ] = "linear",
    warmup: Annotated[float, typer.Option(help="Steps of it, or a share below 1.", rich_help_panel=LOOP)] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Towards the base.", rich_help_panel=LOOP)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.", rich_help_panel=LOOP)] = 1.0,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between measurements. Default: the task's.", show_default=False, rich_help_panel=LOOP),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", help="A tracker: tensorboard, trackio, wandb; repeatable.", rich_help_panel=LOOP),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints. Default: none.", show_default=False, rich_help_panel=FILES),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(help="Checkpoints that stay. Default: all.", show_default=False, rich_help_panel=FILES),
    ] = None,
    full_checkpoints: Annotated[
        bool, typer.Option("--full-checkpoints", help="With the whole model in them.", rich_help_panel=FILES)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole one in --out.", rich_help_panel=FILES)
    ] = False,
    resume_from: Annotated[
        str | None,
        typer.Option("--resume-from", help="Go on from this one.", show_default=False, rich_help_panel=FILES),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="A run that is in --out may go.", rich_help_panel=FILES)
    ] = False,
) -> None:
    """Train a few scalars of a model on a task, save them as a delta, and measure what was saved."""
    if resume and resume_from:
        raise ConfigError("--resume goes on from the newest checkpoint in --out and --resume-from names one: give one.")
    if config_file is not None and epochs is not None and max_steps is not None:
        sources = {n: ctx.get_parameter_source(n) for n in ("epochs", "max_steps")}
        typed = {n for n, source in sources.items() if getattr(source, "name", "") == "COMMANDLINE"}
        epochs, max_steps = epochs if typed != {"max_steps"} else None, max_steps if typed != {"epochs"} else None
    out, data = os.path.expanduser(out), None if data is None else os.path.expanduser(data)
    amount = None if budget is None else values.budget_or_module(budget)
    from selectune.runs.folder import run_folder
    from selectune.runs.stop import Stop

    stop = Stop()
    with run_folder(out, bool(resume or resume_from), overwrite) as folder, working():
        from selectune.runs.config import RunConfig, patterns
        from selectune.runs.training import run

        config = RunConfig(
            model=model,
            task=task,
            method=method,
            on=on,
            budget=amount,
            lr=lr,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            accumulation=accumulation,
            max_length=max_length,
            seed=seed,
            out=out,
            include=patterns(include),
            exclude=patterns(exclude),
            train_fully=patterns(train_fully),
            eval_every=eval_every,
            save_every=save_every,
            keep=keep,
            full_checkpoints=full_checkpoints,
            data=data,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            plugin=tuple(plugin or ()),
            warmup=warmup,
            schedule=schedule,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            group_by_length=group_by_length,
            report_to=() if report_to is None or report_to == ["none"] else tuple(report_to),
        )
        signals.heed(stop)
        found = run(config, ProgressBar(), resume_from or resume, overwrite, stop, folder)
    result(as_json, found.as_json(), _told(found))


def _told(found: RunResult) -> str:
    evaluation = found.evaluation
    return (
        f"{evaluation.task}: {evaluation.metric} {evaluation.value:.4f} on {evaluation.examples:,} examples, "
        f"{found.steps:,} steps in {found.seconds:.0f} s\n"
        + (
            f"{found.selected:,} of {found.budget:,} scalars selected, {found.verification.changed:,} changed"
            + (f", {found.trained:,} trained in all" if found.trained != found.selected else "")
            if found.budget
            else f"{found.trained:,} scalars trained, all of their tensors"
        )
        + f"\n{found.delta} ({found.delta_bytes:,} bytes)"
    )


def evaluate(
    model: Model,
    task: Annotated[str, typer.Option("--task", "-t", help="What to measure; `selectune tasks` lists them.")],
    delta: Annotated[
        str | None,
        typer.Option("--delta", "-d", help="The delta to apply. Without it the base is measured.", show_default=False),
    ] = None,
    data: Data = None,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option(help="Draws the head where no delta says which seed it was.")] = 6,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Measure a model with a delta on a task's validation split; the same number as training printed."""
    from selectune import plugins
    from selectune.models.restore import Source, evaluate_delta

    with working():
        plugins.add_files(plugin or ())
        source = Source(model, revision, dtype, trust_remote_code)
        found = evaluate_delta(source, delta, plugins.task(task), data, max_length, seed)
    result(as_json, found.as_json(), f"{found.task}: {found.metric} {found.value:.4f} on {found.examples:,} examples")
