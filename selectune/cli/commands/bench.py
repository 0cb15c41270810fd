"""`selectune bench` measures methods side by side on one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from selectune.bench.configs import CONFIGS
from selectune.cli import values
from selectune.cli.exits import FAILED
from selectune.cli.options import Plugins
from selectune.cli.output import stderr, working
from selectune.errors import ConfigError

EXAMPLES = (
    "Examples:  selectune bench --methods full,frozen,lora,id3,id3:every=10\n\n"
    "selectune bench --model minilm --methods full,frozen,pafi --budget 5% --json bench.json\n\n"
    "selectune bench --model demo --data real --batch 16 --methods frozen,id3 --compare 10\n\n"
    "Exit codes: 0 done, 1 a method of ours failed, 2 usage error"
)
METHODS = "full,frozen,lora,dora,super,shira,bitfit,pafi,static-d3,random,id3,id3:every=10"


def bench(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help=f"{', '.join(c for c in CONFIGS if c != 'rehearsal')}, or a folder."),
    ] = "bert-6l",
    data: Annotated[
        str,
        typer.Option(help="random tokens, or a task's rows for a trained model (--model demo): real is glue/stsb."),
    ] = "random",
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Examples in a step.")] = 8,
    length: Annotated[int, typer.Option("--length", "--max-length", help="Tokens in an example.")] = 128,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas. id3:every=10 selects at every 10th step.")
    ] = (METHODS),
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Let each selective method select from an adapter: lora:r=8. id3+lora:r=8 does so for one.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[str, typer.Option("--budget", "-b", help="Scalars trained: 114k, or a share of all.")] = "0.17%",
    steps: Annotated[int, typer.Option(help="Measured steps of each method, over all rounds.")] = 30,
    rounds: Annotated[int, typer.Option(help="Rounds. In each, all methods run in a shuffled order.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: fp32, bf16 or fp16.")] = "fp32",
    autocast: Annotated[str | None, typer.Option(help="Autocast to bf16 or fp16.", show_default=False)] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations in backward.")] = False,
    processes: Annotated[
        str,
        typer.Option(help="alive keeps processes between rounds, fresh starts new ones, auto decides by memory."),
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of each process.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and the order of methods.")] = 6,
    live: Annotated[
        bool,
        typer.Option("--live/--no-live", help="Also measure memory without what the C library keeps (CPU)."),
    ] = True,
    compare: Annotated[
        int, typer.Option(help="Compare every so many selections with float64 scores of all entries; 0: none.")
    ] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a method without an answer has failed.")] = 900.0,
    plugin: Plugins = None,
    out: Annotated[
        str | None, typer.Option("--json", help="Write the rows as JSON to this file; - is stdout.", show_default=False)
    ] = None,
) -> None:
    """Measure seconds of a step, peak memory and shipped bytes of methods side by side."""
    from selectune import plugins
    from selectune.bench import table
    from selectune.bench.methods import DENSE, FLOOR, base_of, is_ours
    from selectune.bench.rounds import Settings
    from selectune.bench.rows import run
    from selectune.bench.workload import Bench
    from selectune.spec import names as names_of

    plugins.add_files(plugin or ())
    names = names_of(methods)
    for name in names:
        plugins.want_method(base_of(name))
    names = tuple(name if on is None or not is_ours(name) else f"{name}+{on}" for name in names)
    if out is not None and out != "-" and not Path(out).resolve().parent.is_dir():
        raise ConfigError(f"--json {out}: the folder {Path(out).resolve().parent} does not exist.")
    what = Bench(model, batch, length, values.dtype(dtype), autocast, checkpointing, device, seed, data)
    count, files = values.budget(budget), tuple(plugin or ())
    settings = Settings(what, names, count, steps, rounds, processes, timeout, threads, live, files, compare)
    console = stderr()
    with working():
        report = run(settings, lambda text: console.print(text, style="dim", markup=False))
    text = json.dumps(report, indent=2, allow_nan=False)
    if out == "-":
        typer.echo(text)
    elif out is not None:
        Path(out).write_text(text + "\n", encoding="utf-8")
    columns = [table.cells(row) for row in report["rows"]]
    shown = [table.title(report), table.plain(table.COLUMNS, columns), "", *table.notes(report)]
    typer.echo("\n".join(shown), err=out == "-")
    ours = [r for r in report["rows"] if is_ours(r["method"]) or r["method"] in (DENSE, FLOOR)]
    if any(row["error"] for row in ours):
        raise typer.Exit(FAILED)
