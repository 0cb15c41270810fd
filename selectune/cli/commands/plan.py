"""`selectune plan` predicts what a run takes, before it is run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from selectune.cli import values
from selectune.cli.options import Json, Plugins
from selectune.cli.output import result, working

EXAMPLES = (
    "Example:  selectune plan --model llama-1b --method id3 --budget 320k --batch 4 --length 512 --dtype bf16\n\n"
    "Peak memory is that of live tensors. On a CPU the system also counts blocks that the C library keeps for reuse"
)


def plan(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A bench name (bert-6l, llama-1b, ...), a folder, a hub id, or 'demo'.")
    ],
    method: Annotated[
        str, typer.Option(help="id3, id3:every=10, pafi, lora:r=8, ..., full, or frozen (nothing is trained).")
    ] = "id3",
    on: Annotated[
        str | None,
        typer.Option("--on", help="Select from an adapter on the frozen model: lora:r=32.", show_default=False),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="Scalars trained: 320k, 0.17%, or as many as lora:r=2.")
    ] = "0.17%",
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Examples in a step.")] = 16,
    length: Annotated[int, typer.Option("--length", "--max-length", help="Tokens in an example.")] = 256,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, to count updates.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: fp32, bf16 or fp16.")] = "fp32",
    autocast: Annotated[str | None, typer.Option(help="Autocast to bf16 or fp16.", show_default=False)] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations in backward.")] = False,
    optimizer: Annotated[str, typer.Option(help="Optimizer: adamw, adam, sgd or momentum.")] = "adamw",
    device: Annotated[str, typer.Option(help="cpu or cuda: where the run will be. Neither is used here.")] = "cpu",
    ranks: Annotated[int, typer.Option(help="Processes that train together, each with such a batch.")] = 1,
    quantise: Annotated[
        str | None, typer.Option(help="The base in 8 or 4 bits: int8, nf4 or gguf.", show_default=False)
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Predict a run's peak memory, delta size and update counts from the model's config. No weights are needed."""
    from selectune import plugins
    from selectune.bench.estimate import plan as predict
    from selectune.bench.table import planned
    from selectune.bench.workload import Bench

    with working():
        plugins.add_files(plugin or ())
        bench = Bench(model, batch, length, values.dtype(dtype), autocast, checkpointing, device)
        found = asdict(predict(bench, method, values.budget_or_adapter(budget), steps, optimizer, on, ranks, quantise))
    result(as_json, found, planned(found))
