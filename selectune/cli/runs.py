"""`selectune train` and `selectune eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from selectune.cli import signals, values
from selectune.cli.options import Data, Dtype, Json, MaxLength, Model, Revision, Trust
from selectune.cli.output import Bar, result, stderr, working
from selectune.errors import StoppedError

if TYPE_CHECKING:
    from selectune.harness.train import RunResult

TRAIN_EXAMPLES = (
    "Examples:\n\nselectune train --model demo --task glue/rte --budget 103k --epochs 3 --out runs/rte\n\n"
    "selectune train --model demo --task glue/stsb --method bitfit --out runs/bias\n\n"
    "selectune train --model demo --task glue/rte --on lora:r=32 --method id3 --budget 114k --out runs/on-lora\n\n"
    "selectune train --model ./my-model --task glue/cola --method id3 --budget 0.17% --exp 1 --every 10 --out runs/cola"
    "\n\nselectune train --model demo --task glue/rte --budget 103k --save-every 100 --out runs/rte --resume"
)
EVAL_EXAMPLES = "Example:  selectune eval --model demo --delta runs/rte --task glue/rte --json"


def train(
    model: Model,
    task: Annotated[str, typer.Option("--task", "-t", help="What to learn; `selectune tasks` lists them.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for delta.safetensors and run.json.")],
    method: Annotated[
        str, typer.Option(help="How scalars are chosen, or a peer such as lora:r=8; `selectune methods` lists.")
    ] = "id3",
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Select from a module on the frozen model, such as lora:r=32 or pfeiffer:reduction=16.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Scalars that may change: 103k, 1.5m, 320_000, or a share: 0.17%.",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Learning rate. Default: 5e-4; 5e-5 for full, 4e-5 for Child-Tuning; peers have their own.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the training set. Default: the task's.", show_default=False),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, in place of --epochs.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in one backward pass.")] = 16,
    accumulation: Annotated[
        int, typer.Option(help="Backward passes that make one step; selection is exact over their sum.")
    ] = 1,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option(help="Draws the task head, the order of the data, dropout, random masks.")] = 6,
    exp: Annotated[
        float | None,
        typer.Option(help="ID3, D3: the exponent of |g| / (|w| + eps)^exp.", show_default=False),
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="ID3, D3: what is added to |w|; above 0.", show_default=False)
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            help="ID3: select the quotas of k steps at every k-th step; cheaper. FISH-DIP, SpIEL, RigL, SET: "
            "steps between selections.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="SpIEL: steps that gradients are watched before an exchange.", show_default=False),
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="SpIEL, RigL, SET: share of the entries exchanged.", show_default=False)
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            help="Fish: how many single examples are read before training. FISH-DIP: how many of the hardest count.",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[
        int | None,
        typer.Option(help="FISH-DIP: how many examples are ranked by their loss. Default: all.", show_default=False),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(
            help="SNIP, GraSP, movement, Child-Tuning-D: how many mini-batches are read before training.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Fish: 'data' (their own labels) or 'model' (every class, weighted).", show_default=False),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="SparseAdapter: snip, grasp, synflow, magnitude or random.", show_default=False),
    ] = None,
    p: Annotated[
        float | None,
        typer.Option("--p", help="Child-Tuning-F: share of the gradient that a step keeps.", show_default=False),
    ] = None,
    dense: Annotated[
        float | None,
        typer.Option(help="LT-SFT, Diff pruning: share of the steps that train everything.", show_default=False),
    ] = None,
    dense_lr: Annotated[
        float | None,
        typer.Option(help="The learning rate of these steps. Default: the paper's.", show_default=False),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="LT-SFT: in how many rounds the budget is selected.", show_default=False)
    ] = None,
    l1: Annotated[
        float | None,
        typer.Option("--l1", help="LT-SFT: penalty on the mean change while all is trained.", show_default=False),
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(help="Diff pruning: penalty on the number of open gates.", show_default=False)
    ] = None,
    structured: Annotated[
        bool | None,
        typer.Option(help="Diff pruning: a further gate for each tensor. Default: yes.", show_default=False),
    ] = None,
    group_penalty: Annotated[
        str | None,
        typer.Option(help="Diff pruning: 'product' or 'sum' of a tensor's and an entry's.", show_default=False),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(help="Diff pruning: kept entries go on from 'base' or 'found' values.", show_default=False),
    ] = None,
    gate_lr: Annotated[
        float | None, typer.Option(help="Diff pruning: the gates' learning rate. Default: 0.1.", show_default=False)
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only these tensors may be chosen from: patterns such as '*.attention.*'; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="These may not, such as '*embeddings*'; repeatable.")
    ] = None,
    train_fully: Annotated[
        list[str] | None,
        typer.Option(help="These are trained whole, outside the budget, such as 'classifier.*'; repeatable."),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between two measurements. Default: the task's.", show_default=False),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(help="Steps between two checkpoints with their delta. Default: none.", show_default=False),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(help="How many checkpoints stay, the newest. Default: all; they are small.", show_default=False),
    ] = None,
    full_checkpoints: Annotated[
        bool, typer.Option("--full-checkpoints", help="Put the whole model into every checkpoint, not the delta alone.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="A run that is in --out may go; otherwise it is refused.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint in --out; the other options as they were."),
    ] = False,
    resume_from: Annotated[
        str | None,
        typer.Option("--resume-from", help="Go on from this checkpoint: a folder checkpoint-N.", show_default=False),
    ] = None,
    data: Data = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    warmup: Annotated[
        float, typer.Option(help="Steps (or a share below 1 of them) over which the learning rate rises.")
    ] = 0.0,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: linear, cosine or constant.")] = "linear",
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay; only trained scalars decay.")] = 0.0,
    group_by_length: Annotated[
        bool,
        typer.Option("--group-by-length", help="Batches of rows of like length: less padding, another order."),
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            "--report-to", help="Send the log to a tracker, such as tensorboard, trackio or wandb; repeatable."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a few scalars of a model on a task, save them as a delta, and measure what was saved."""
    amount = None if budget is None else values.budget(budget)
    from selectune.harness.folder import run_folder
    from selectune.harness.stop import Stop

    stop = Stop()
    with run_folder(out, bool(resume or resume_from), overwrite) as folder, working():
        from selectune.harness.config import RunConfig, patterns
        from selectune.harness.train import run

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
            exp=exp,
            eps=eps,
            every=every,
            window=window,
            fraction=fraction,
            examples=examples,
            pool=pool,
            batches=batches,
            labels=labels,
            score=score,
            p=p,
            dense=dense,
            dense_lr=dense_lr,
            rounds=rounds,
            l1=l1,
            penalty=penalty,
            structured=structured,
            group_penalty=group_penalty,
            start_from=start_from,
            gate_lr=gate_lr,
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
            warmup=warmup,
            schedule=schedule,
            weight_decay=weight_decay,
            group_by_length=group_by_length,
            report_to=() if report_to is None or report_to == ["none"] else tuple(report_to),
        )
        signals.heed(stop)
        try:
            found = run(config, Bar(), resume_from or resume, overwrite, stop, folder)
        except StoppedError as stopped:
            stderr().print(f"[yellow]{escape(str(stopped))}[/]")
            raise typer.Exit(signals.exit_code(stopped.signal)) from None
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
    as_json: Json = False,
) -> None:
    """Measure a model with a delta on a task's validation split; the same number as training printed."""
    from selectune import tasks
    from selectune.harness.restore import Source, evaluate_delta

    with working():
        source = Source(model, revision, dtype, trust_remote_code)
        found = evaluate_delta(source, delta, tasks.get(task), data, max_length, seed)
    result(as_json, found.as_json(), f"{found.task}: {found.metric} {found.value:.4f} on {found.examples:,} examples")
